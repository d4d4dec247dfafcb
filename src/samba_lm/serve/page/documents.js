// Documents that the server has read: its contexts. Making one, choosing one for a conversation, forking, deleting.

import { announce, ask, byId, el, icon, iconButton, notice, refill } from "./dom.js";
import { brief, bytes, count, tokens } from "./words.js";

export class Documents {
  /** `chat()`: the conversation that is shown; `onChoose(context or null)`: for it; `onKey()`: the server asks for one. */
  constructor(api, { chat, onChoose, onKey }) {
    Object.assign(this, { api, chat, onChoose, onKey });
    this.all = [];
    this.changes = 0;
    this.control = null;
    byId("add-document").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", (event) => {
      const [file] = event.target.files;
      if (file) this.add(file);
      event.target.value = ""; // the same file may be chosen again
    });
    byId("reading-cancel").addEventListener("click", () => this.control?.abort());
    this.#dropping();
  }

  /** Ask the server what it has. */
  async load() {
    try {
      let changes;
      let all;
      do {
        changes = this.changes;
        all = await this.api.contexts();
      } while (changes !== this.changes); // one was made or deleted while the server told what it has
      this.all = all;
    } catch (error) {
      if (error.status === 404 || error.status === 405) {
        byId("documents").hidden = true; // a server without contexts
      } else if (error.status !== 401 && error.status !== 0) {
        this.#tell(error); // the page tells of these two elsewhere
      }
      return;
    }
    this.draw();
  }

  #have(all) {
    this.all = all;
    this.changes += 1;
  }

  draw() {
    const chosen = this.chat().context;
    refill(byId("document-list"), this.all.map((one) => this.#item(one, one.id === chosen?.id)));
  }

  /** Let the server read a file. */
  async add(file) {
    if (this.control) {
      this.#tell(new Error("A document is being read: wait for it, or cancel it."));
      return;
    }
    this.#tell(null);
    const asked = this.chat();
    const control = new AbortController();
    this.control = control;
    this.#progress(file.name);
    try {
      const text = await checked(file);
      let made = null;
      for await (const event of this.api.read(text, title(file.name), control.signal)) {
        if (event.object === "context") made = event;
        else this.#progress(file.name, event.read, event.total);
      }
      if (made) {
        this.#have([made, ...this.all]);
        if (this.chat() === asked) this.onChoose(made);
        announce(`${made.title} has been read: ${tokens(made.tokens)}`);
      }
    } catch (error) {
      if (error.name !== "AbortError") this.#tell(error);
      if (error.status === 401) this.onKey();
    } finally {
      this.control = null;
      byId("reading").hidden = true;
      byId("add-document").disabled = false;
      this.draw();
    }
  }

  #progress(name, read = null, total = null) {
    const bar = byId("reading-bar");
    byId("reading").hidden = false;
    byId("add-document").disabled = true;
    byId("reading-title").textContent = name;
    if (read !== null && total) {
      bar.max = total;
      bar.value = read;
      byId("reading-count").textContent = `${Math.floor((100 * read) / total)}% of ${tokens(total)}`;
    } else {
      bar.removeAttribute("value"); // it moves, and tells no share
      byId("reading-count").textContent = read === null ? "Sending" : `${count(read)} tokens`;
    }
  }

  #item(context, chosen) {
    const choose = el(
      "button",
      {
        type: "button",
        class: "entry",
        "aria-pressed": String(chosen),
        "data-focus": context.id,
        on: { click: () => this.onChoose(chosen ? null : context) },
      },
      icon("page"),
      el(
        "span",
        { class: "names clip" },
        el("span", { class: "clip" }, context.title || "Untitled"),
        el("span", { class: "hint clip" }, `${tokens(context.tokens)} \u00b7 ${bytes(context.bytes)}`),
      ),
    );
    return el(
      "li",
      { class: chosen ? "item on" : "item" },
      choose,
      el(
        "div",
        { class: "tools" },
        iconButton("fork", `Fork ${context.title}`, () => this.#fork(context), { "data-focus": `fork ${context.id}` }),
        iconButton("bin", `Delete ${context.title}`, () => this.#remove(context)),
      ),
    );
  }

  async #fork(context) {
    this.#tell(null);
    try {
      const copy = await this.api.fork(context.id, title(`${context.title} (copy)`));
      this.#have([copy, ...this.all]);
      this.draw();
      announce(`A copy of ${context.title}`);
    } catch (error) {
      this.#tell(error);
    }
  }

  async #remove(context) {
    if (!(await ask(`Delete the document \u201c${context.title}\u201d from the server?`))) return;
    this.#tell(null);
    try {
      await this.api.remove(context.id);
    } catch (error) {
      if (error.status !== 404) {
        this.#tell(error);
        return;
      }
    }
    this.#have(this.all.filter((one) => one.id !== context.id));
    if (this.chat().context?.id === context.id) this.onChoose(null);
    this.draw();
    announce(`${context.title} is deleted`);
    byId("add-document").focus();
  }

  #tell(error) {
    byId("document-notice").replaceChildren(...(error ? [notice(error.message)] : []));
  }

  /** A file may be dropped anywhere on the page. */
  #dropping() {
    addEventListener("dragover", (event) => {
      if (event.dataTransfer.types.includes("Files")) event.preventDefault();
    });
    addEventListener("drop", (event) => {
      const [file] = event.dataTransfer.files;
      if (!file) return;
      event.preventDefault();
      if (!byId("documents").hidden) this.add(file);
    });
  }
}

/** A file as a Blob of UTF-8. Throws an error for people where it is no text. */
async function checked(file) {
  let content;
  try {
    content = await file.arrayBuffer();
  } catch {
    throw new Error(`${file.name} cannot be read: it may have been moved or changed.`);
  }
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(content);
  } catch {
    throw new Error(`${file.name} is not a UTF-8 text: save it as one first.`);
  }
  if (text.includes("\0")) throw new Error(`${file.name} is not a text.`);
  if (!text.trim()) throw new Error(`${file.name} is empty.`);
  return new Blob([text]); // without a byte order mark
}

/** A file's name as a title: one printable line. */
const title = (name) => brief(name.replace(/[\p{C}]/gu, " "), 200) || "Untitled";
