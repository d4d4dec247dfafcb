// Making elements. Text only ever becomes text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element. `props`: `class`, `on` (an object of listeners), `hidden` and other properties that are booleans,
 * and attributes. Children: nodes and strings; null and false are left out.
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else if (typeof value === "boolean" && !name.startsWith("aria-")) {
      node[name] = value;
    } else if (value !== null && value !== undefined) {
      node.setAttribute(name, value);
    }
  }
  node.append(...children.filter((child) => child !== null && child !== false && child !== undefined));
  return node;
}

/** One of the symbols of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button that shows a symbol; the label is for screen readers and as a hint. */
export function iconButton(name, label, click, props = {}) {
  return el(
    "button",
    { type: "button", class: "icon", "aria-label": label, title: label, ...props, on: { click } },
    icon(name),
  );
}

/** Put other elements into a list; what has the focus keeps it, where the new ones have the same `data-focus`. */
export function refill(list, items) {
  const key = list.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
  list.replaceChildren(...items);
  if (key) list.querySelector(`[data-focus="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

/** Say something to screen readers. */
export function announce(text) {
  const live = byId("live");
  live.textContent = "";
  // A text that is the same as the last one would not be read again without the pause.
  setTimeout(() => {
    live.textContent = text;
  }, 50);
}

/** Ask before something is lost. Resolves to true or false; Escape is a no. */
export function ask(text, yes = "Delete", no = "Keep") {
  const dialog = byId("ask");
  byId("ask-text").textContent = text;
  byId("ask-yes").textContent = yes;
  byId("ask-no").textContent = no;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/**
 * A message that something went wrong, with a way to go on. `waitSeconds`: the action opens after so long, counted down.
 */
export function notice(text, action = null, waitSeconds = 0) {
  const box = el("div", { class: "notice", role: "alert" }, el("p", {}, text));
  if (action) {
    const button = el("button", { type: "button", on: { click: action.run } }, action.label);
    box.append(button);
    let left = Math.ceil(waitSeconds);
    const tick = () => {
      button.disabled = left > 0;
      button.textContent = left > 0 ? `${action.label} in ${left} s` : action.label;
      if (left-- > 0) setTimeout(tick, 1000);
    };
    tick();
  }
  return box;
}
