// Conversations, kept in this browser: one entry of localStorage each, so that two tabs do not overwrite each other.
//
// A chat: {id, created, updated, context: {id, title, tokens} or null, messages}. A message: {role, content} and, of an
// answer, `end` (how it ended), `stats` (see answer.js) and `error` (what the reader was told).

import { brief } from "./words.js";

const PREFIX = "samba-lm.chat.";

export class Chats {
  constructor() {
    this.all = new Map();
    this.full = false;
    this.onChange = () => {};
    this.#load();
    addEventListener("storage", (event) => {
      if (event.key !== null && !event.key.startsWith(PREFIX)) return;
      if (event.key === null) this.#load();
      else this.#take(event.key, event.newValue);
      this.onChange();
    });
  }

  #load() {
    this.all.clear();
    try {
      for (const key of Object.keys(localStorage)) {
        if (key.startsWith(PREFIX)) this.#take(key, localStorage.getItem(key));
      }
    } catch {
      this.full = true; // storage is switched off
    }
  }

  #take(key, text) {
    const id = key.slice(PREFIX.length);
    if (text === null) {
      this.all.delete(id);
      return;
    }
    try {
      const chat = JSON.parse(text);
      if (chat.id === id && isChat(chat)) this.all.set(id, Object.assign(this.all.get(id) ?? {}, chat));
    } catch {
      // Not ours, or damaged: it is not shown, and stays where it is.
    }
  }

  /** The newest first. */
  list() {
    return [...this.all.values()].sort((a, b) => b.updated - a.updated);
  }

  /** A new one; it is kept as soon as it has a message. */
  create(context = null, messages = []) {
    const now = Date.now();
    return { id: newId(), created: now, updated: now, context, messages };
  }

  /** A copy of a chat's first messages that goes its own way. */
  fork(chat, upTo = chat.messages.length) {
    const copy = this.create(chat.context, structuredClone(chat.messages.slice(0, upTo)));
    this.save(copy);
    return copy;
  }

  /** Keep a chat. False where the browser has no room, or keeps nothing. */
  save(chat, touch = true) {
    if (!chat.messages.length) return true;
    if (touch) chat.updated = Date.now();
    this.all.set(chat.id, chat);
    try {
      localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
      this.full = false;
    } catch {
      this.full = true;
    }
    return !this.full;
  }

  remove(id) {
    this.all.delete(id);
    try {
      localStorage.removeItem(PREFIX + id);
    } catch {
      // Nothing was kept.
    }
  }
}

function isChat(chat) {
  return (
    Array.isArray(chat.messages) &&
    Number.isFinite(chat.updated) &&
    chat.messages.every((one) => ["user", "assistant"].includes(one.role) && typeof one.content === "string")
  );
}

/** crypto.randomUUID is only there on https and localhost. */
function newId() {
  const random = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** What a chat is called: the first words that were said. */
export function title(chat) {
  const first = chat.messages.find((message) => message.role === "user");
  return first ? brief(first.content) || "Untitled" : "New chat";
}

/** A conversation as a plain text. */
export function asText(chat, model) {
  const head = [`${title(chat)}`, `Model: ${model}`, `Begun: ${new Date(chat.created).toLocaleString()}`];
  if (chat.context) head.push(`After the document: ${chat.context.title}`);
  const said = chat.messages.map(
    (message) => `${message.role === "user" ? "You" : model}:\n${message.content.trim()}\n`,
  );
  return `${head.join("\n")}\n\n${said.join("\n")}`;
}
