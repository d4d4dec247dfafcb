// The messages of a conversation on the page.

import { figures } from "./answer.js";
import { announce, byId, el, iconButton, notice, refill } from "./dom.js";

const NEAR_END = 80; // pixels

/**
 * Shows one conversation. `actions`: edit(index, text), again(), fork(upTo), each called with what the reader chose.
 */
export class Messages {
  constructor(actions) {
    this.actions = actions;
    this.list = byId("messages");
    this.log = byId("log");
    this.latest = byId("latest");
    this.follow = true;
    this.pending = "";
    this.frame = 0;
    this.log.addEventListener("scroll", () => this.#scrolled());
    this.latest.addEventListener("click", () => {
      this.toEnd();
      byId("input").focus();
    });
    new ResizeObserver(() => this.follow && this.toEnd()).observe(this.list);
  }

  /** Draw all messages anew. `running`: the last one is being written. */
  show(chat, running) {
    this.chat = chat;
    this.running = running;
    this.pending = "";
    refill(this.list, chat.messages.map((message, index) => this.#item(message, index)));
    this.list.setAttribute("aria-busy", String(running));
    byId("welcome").hidden = chat.messages.length > 0;
    this.follow = true;
    this.toEnd();
  }

  /** More text of the last message. It is drawn with the next frame: texts may come faster than can be seen. */
  append(text) {
    this.pending += text;
    this.frame ||= requestAnimationFrame(() => this.#flush());
  }

  #flush() {
    this.frame = 0;
    const last = this.list.lastElementChild?.querySelector(".text");
    const text = this.pending;
    if (last?.firstChild instanceof Text) last.firstChild.appendData(text);
    else if (text.trim()) last?.replaceChildren(text.trimStart());
    else return; // blanks at the start are not shown
    this.pending = "";
  }

  toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
    this.follow = true;
    this.latest.hidden = true;
  }

  #scrolled() {
    this.follow = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < NEAR_END;
    this.latest.hidden = this.follow;
  }

  #item(message, index) {
    const mine = message.role === "user";
    const last = index === this.chat.messages.length - 1;
    const writing = last && this.running;
    const text = el("div", { class: "text" });
    const shown = writing ? message.content.trimStart() : message.content.trim();
    if (shown.trim()) text.append(shown);
    else if (writing) text.append(el("span", { class: "waiting" }, "Reading"));
    else if (!message.error) text.append(el("span", { class: "hint" }, message.content ? "Nothing but blanks." : "An empty answer."));
    const item = el(
      "li",
      { class: mine ? "message mine" : "message" },
      el("h3", { class: mine ? "hidden" : "who" }, mine ? "You" : (message.model ?? "Model")),
      text,
    );
    if (message.error) item.append(this.#trouble(message, last));
    if (!writing) item.append(this.#foot(message, index, last, item));
    return item;
  }

  #trouble(message, last) {
    const wait = Math.max(0, ((message.retryAt ?? 0) - Date.now()) / 1000);
    const action = last ? { label: "Try again", run: () => this.actions.again() } : null;
    return notice(message.error, action, wait);
  }

  #foot(message, index, last, item) {
    const mine = message.role === "user";
    const buttons = [
      message.content !== "" && this.#copyButton(message),
      mine && !this.running && iconButton("edit", "Edit and send again", () => this.#edit(message, index, item)),
      !mine && last && !message.error && iconButton("again", "Another answer", () => this.actions.again()),
      (message.content !== "" || !message.error) &&
        iconButton("fork", "Fork the conversation here", () => this.actions.fork(index + 1)),
    ];
    for (const button of buttons) if (button) button.dataset.focus = `${index} ${button.title}`;
    const figured = figures(message).map((part) => el("span", {}, part));
    return el("div", { class: "foot" }, el("div", { class: "tools" }, ...buttons.filter(Boolean)),
      figured.length ? el("p", { class: "figures" }, ...figured) : null);
  }

  #copyButton(message) {
    const button = iconButton("copy", "Copy", async () => {
      const done = await copy(message.content.trim());
      announce(done ? "Copied" : "The browser did not let the page copy");
      button.classList.toggle("done", done);
      setTimeout(() => button.classList.remove("done"), 1200);
    });
    return button;
  }

  #edit(message, index, item) {
    const field = el("textarea", { "aria-label": "Your message", rows: "3" });
    field.value = message.content;
    const send = () => field.value.trim() && this.actions.edit(index, field.value);
    const leave = () => {
      const anew = this.#item(message, index);
      item.replaceWith(anew);
      anew.querySelector('[aria-label^="Edit"]')?.focus();
    };
    const form = el(
      "form",
      {
        class: "editor",
        on: {
          submit: (event) => {
            event.preventDefault();
            send();
          },
          keydown: (event) => {
            if (event.key === "Escape") {
              event.stopPropagation();
              leave();
            } else if (isSend(event) && event.target === field) {
              event.preventDefault();
              send();
            }
          },
        },
      },
      field,
      el("p", { class: "hint" }, "What came after it is replaced. Fork first to keep it."),
      el("div", { class: "row" }, el("button", { type: "button", on: { click: leave } }, "Cancel"),
        el("button", { class: "primary" }, "Send")),
    );
    item.querySelector(".text").replaceWith(form);
    item.querySelector(".foot").remove();
    this.follow = false; // the conversation grows above its end
    field.focus();
    item.scrollIntoView({ block: "nearest" });
  }
}

/** Enter alone, and not the one that ends the composing of a character. */
export function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.altKey && !event.isComposing;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false; // not allowed, or not a secure connection
  }
}
