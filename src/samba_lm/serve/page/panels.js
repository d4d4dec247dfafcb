// The panels at the sides: beside the conversation where there is room, over it where there is not.

import { byId } from "./dom.js";

const PANELS = {
  side: { narrow: matchMedia("(max-width: 860px)"), open: true },
  settings: { narrow: matchMedia("(max-width: 1180px)"), open: false },
};

export class Panels {
  constructor() {
    this.states = Object.entries(PANELS).map(([id, { narrow, open }]) => {
      const state = { id, narrow, open: open && !narrow.matches };
      byId(`toggle-${id}`).addEventListener("click", () => this.#set(state, !state.open));
      byId(`close-${id}`).addEventListener("click", () => this.#set(state, false));
      narrow.addEventListener("change", () => {
        state.open = open && !narrow.matches;
        this.#draw();
      });
      return state;
    });
    byId("scrim").addEventListener("click", () => this.closeOverlay());
    this.#draw();
  }

  /** Panels lie over the conversation. */
  get narrow() {
    return PANELS.side.narrow.matches;
  }

  open(id) {
    this.#set(this.states.find((state) => state.id === id), true);
  }

  /** Close what lies over the conversation (with `id`: if it is that panel); false where nothing was closed. */
  closeOverlay(id = null) {
    const over = this.#over();
    if (!over || (id && over.id !== id)) return false;
    this.#set(over, false);
    return true;
  }

  #over() {
    return this.states.find((state) => state.open && state.narrow.matches);
  }

  #set(state, open) {
    if (open && state.narrow.matches) this.closeOverlay();
    const inside = byId(state.id).contains(document.activeElement);
    state.open = open;
    this.#draw();
    if (open && state.narrow.matches) byId(`close-${state.id}`).focus();
    else if (!open && inside) byId(`toggle-${state.id}`).focus();
  }

  #draw() {
    const over = this.#over();
    for (const state of this.states) {
      const panel = byId(state.id);
      panel.hidden = !state.open;
      panel.classList.toggle("over", state === over);
      panel.inert = over !== undefined && state !== over;
      byId(`toggle-${state.id}`).setAttribute("aria-expanded", String(state.open));
    }
    byId("main").inert = over !== undefined;
    byId("scrim").hidden = over === undefined;
  }
}
