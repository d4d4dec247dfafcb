// The colours: as the system has them, or as the reader chose. A plain script, so that it runs before the first paint.
"use strict";

(() => {
  const THEMES = ["system", "light", "dark"];
  const KEY = "samba-lm.theme";

  function stored() {
    try {
      const theme = localStorage.getItem(KEY);
      return THEMES.includes(theme) ? theme : "system";
    } catch {
      return "system"; // storage is switched off
    }
  }

  function apply(theme) {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  }

  let theme = stored();
  apply(theme);

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const tell = () => {
      const text = `Theme: ${theme}`;
      button.setAttribute("aria-label", text);
      button.title = text;
    };
    tell();
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      apply(theme);
      tell();
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // It holds until the page is left.
      }
    });
  });
})();
