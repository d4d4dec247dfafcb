// The conversation that is shown: sending, stopping, asking again, forking. Answers go on while another is shown.

import { answer } from "./answer.js";
import { title } from "./chats.js";
import { announce, byId } from "./dom.js";
import { Messages } from "./messages.js";

const SAVE_EVERY = 1000; // milliseconds, while an answer is written

export class Conversation {
  /**
   * `on`: onChange() when the list of conversations is another, onKey() when the server asks for a key, onWrong(field)
   * when a setting cannot be sent, onMissing() when the document is gone, onFull() when the browser keeps no more.
   */
  constructor(api, chats, settings, on) {
    Object.assign(this, { api, chats, settings, ...on });
    this.model = "Model";
    this.running = new Map(); // chat id -> AbortController
    this.messages = new Messages({
      edit: (index, text) => this.#edit(index, text),
      again: () => this.again(),
      fork: (upTo) => this.fork(upTo),
    });
    this.chat = chats.create();
  }

  get busy() {
    return this.running.has(this.chat.id);
  }

  /** Show a conversation. */
  open(chat) {
    this.chat = chat;
    this.draw();
  }

  draw() {
    const { chat } = this;
    byId("title").textContent = title(chat);
    document.title = chat.messages.length ? `${title(chat)} \u2013 samba-lm` : "samba-lm";
    byId("send").hidden = this.busy;
    byId("stop").hidden = !this.busy;
    byId("export").disabled = byId("fork-chat").disabled = !chat.messages.length;
    this.messages.show(chat, this.busy);
    this.onChange();
  }

  /** Send what the reader wrote. False where it cannot be sent now. */
  send(text) {
    if (this.busy || !text.trim() || this.#wrong()) return false;
    this.chat.messages.push({ role: "user", content: text.trim() });
    this.#ask(this.chat);
    return true;
  }

  /** The last answer once more. */
  again() {
    if (this.busy || this.#wrong()) return;
    const { messages } = this.chat;
    if (messages.at(-1)?.role === "assistant") messages.pop();
    if (messages.length) this.#ask(this.chat);
    byId("input").focus();
  }

  stop() {
    this.running.get(this.chat.id)?.abort();
  }

  /** End the answer of a conversation that is thrown away. */
  drop(chat) {
    this.running.get(chat.id)?.abort();
    this.running.delete(chat.id);
  }

  /** Keep what has come so far: the page is being left. */
  keep() {
    for (const id of this.running.keys()) this.chats.save(this.chats.all.get(id));
  }

  fork(upTo) {
    this.open(this.chats.fork(this.chat, upTo));
    announce("A copy of the conversation: it goes its own way from here");
    byId("input").focus();
  }

  #edit(index, text) {
    if (this.busy || this.#wrong()) return;
    this.chat.messages.length = index;
    this.send(text);
    byId("input").focus();
  }

  #wrong() {
    const field = this.settings.wrong();
    if (field) this.onWrong(field);
    return field !== null;
  }

  async #ask(chat) {
    const control = new AbortController();
    const body = this.#body(chat);
    const message = { role: "assistant", content: "", model: this.model };
    chat.messages.push(message);
    this.running.set(chat.id, control);
    if (!this.chats.save(chat)) this.onFull();
    this.draw();
    announce("The model answers");
    let saved = performance.now();
    await answer(this.api, body, message, control.signal, (text) => {
      if (chat === this.chat) this.messages.append(text);
      if (performance.now() - saved > SAVE_EVERY && this.running.get(chat.id) === control) {
        saved = performance.now();
        this.chats.save(chat);
      }
    });
    if (this.running.get(chat.id) !== control) return; // thrown away meanwhile
    this.running.delete(chat.id);
    this.chats.save(chat);
    if (message.status === 401) this.onKey();
    if (message.status === 404 && chat.context) this.onMissing();
    if (chat === this.chat) {
      const focused = document.activeElement === byId("stop");
      const { follow } = this.messages;
      const { scrollTop } = this.messages.log;
      this.draw();
      if (!follow) this.messages.log.scrollTop = scrollTop;
      if (focused) byId("input").focus();
    } else {
      this.onChange();
    }
    announce(message.error ?? `The answer: ${message.content.trim() || "empty"}`);
  }

  /** The request for a conversation's next answer. */
  #body(chat) {
    const messages = chat.messages
      .filter(({ content, error }) => content || !error)
      .map(({ role, content }) => ({ role, content }));
    if (this.settings.system) messages.unshift({ role: "system", content: this.settings.system });
    const body = { messages, ...this.settings.request() };
    if (chat.context) body.context_id = chat.context.id;
    return body;
  }
}
