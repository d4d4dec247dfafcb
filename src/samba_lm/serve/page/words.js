// Numbers as people read them.

const whole = new Intl.NumberFormat("en");

/** 12,345 */
export const count = (number) => whole.format(number);

/** "1 token", "12,345 tokens" */
export const tokens = (number) => `${count(number)} ${number === 1 ? "token" : "tokens"}`;

/** 1.2 MB */
export function bytes(number) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${unit && number < 10 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}

/** 1.7 billion */
export function amount(number) {
  const names = [[1e9, "billion"], [1e6, "million"]];
  for (const [size, name] of names) {
    if (number >= size) return `${(number / size).toFixed(number < 10 * size ? 1 : 0)} ${name}`;
  }
  return count(number);
}

/** 0.42 s, 12 s, 3 min 5 s */
export function seconds(number) {
  if (number < 10) return `${number.toFixed(2)} s`;
  if (number < 60) return `${Math.round(number)} s`;
  return `${Math.floor(number / 60)} min ${Math.round(number % 60)} s`;
}

/** What a token rate is: 8.3 or 120. */
export const rate = (number) => (number < 10 ? number.toFixed(1) : count(Math.round(number)));

/** The first words of a text, on one line. */
export function brief(text, most = 60) {
  const line = text.trim().replace(/\s+/gu, " ");
  const letters = [...line];
  return letters.length <= most ? line : `${letters.slice(0, most - 1).join("").trimEnd()}\u2026`;
}
