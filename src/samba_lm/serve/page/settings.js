// How answers are drawn. Kept in this browser, but for the API key, which goes with the tab.

import { byId } from "./dom.js";

const KEPT = "samba-lm.settings";
const NUMBERS = ["temperature", "top_p", "min_p", "max_tokens", "seed"];
const MAX_TOKENS = 512;

export class Settings {
  constructor(api) {
    this.form = byId("settings-form");
    this.onKey = () => {};
    this.#restore();
    this.form.addEventListener("input", (event) => this.#changed(event.target));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    byId("key").value = api.key;
    byId("key").addEventListener("change", (event) => {
      api.setKey(event.target.value);
      this.onKey();
    });
    byId("defaults").addEventListener("click", () => {
      for (const name of [...NUMBERS, "system"]) {
        byId(name).value = "";
        this.#changed(byId(name));
      }
    });
  }

  /** Show the field of the API key. */
  needKey() {
    byId("key-field").hidden = false;
  }

  /** What the server allows. */
  limit(maxTokens) {
    if (!maxTokens) return;
    byId("max_tokens").max = maxTokens;
    byId("max_tokens").placeholder = Math.min(MAX_TOKENS, maxTokens);
  }

  /** The first field that cannot be sent, or null. */
  wrong() {
    return NUMBERS.map(byId).find((field) => !field.checkValidity()) ?? null;
  }

  /** The fields of a request. */
  request() {
    const asked = { max_tokens: Number(byId("max_tokens").placeholder) };
    for (const name of NUMBERS) {
      const field = byId(name);
      if (field.value.trim() !== "") asked[name] = Number(field.value);
    }
    return asked;
  }

  /** What stands before a conversation. */
  get system() {
    return byId("system").value.trim();
  }

  #changed(field) {
    if (field.type === "number") field.setAttribute("aria-invalid", String(!field.checkValidity()));
    if (field.id === "key") return;
    const values = Object.fromEntries([...NUMBERS, "system"].map((name) => [name, byId(name).value]));
    try {
      localStorage.setItem(KEPT, JSON.stringify(values));
    } catch {
      // They hold until the page is left.
    }
  }

  #restore() {
    try {
      const values = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
      for (const name of [...NUMBERS, "system"]) {
        if (typeof values[name] === "string") byId(name).value = values[name];
      }
    } catch {
      // Damaged, or switched off: the defaults.
    }
  }
}
