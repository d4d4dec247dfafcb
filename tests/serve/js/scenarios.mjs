// What people do on the page. Things are found as screen readers name them, so that a label that is lost fails too.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";

const LONG = "100000000";
const IMAGE = "<img src=x onerror=alert(1)>";

const field = (page) => page.getByRole("textbox", { name: "Message", exact: true });
const button = (page, name) => page.getByRole("button", { name, exact: true });
const answers = (page) => page.locator("#messages .message:not(.mine)");
const lastText = (page) => answers(page).last().locator(".text");
const figures = (page) => answers(page).last().locator(".figures");
const documents = (page) => page.getByRole("region", { name: "Documents" });
const chatNames = (page) => page.getByRole("navigation", { name: "Conversations" }).locator(".entry");

async function open(page, url, settings = {}) {
  await page.addInitScript((values) => {
    if (!localStorage.getItem("samba-lm.settings")) localStorage.setItem("samba-lm.settings", JSON.stringify(values));
  }, { max_tokens: "24", temperature: "0", ...settings });
  await page.goto(url);
  await connected(page);
}

/** Until the server has told what it serves. */
const connected = (page) => page.locator("#status:not(:empty)").waitFor();

async function say(page, text) {
  await field(page).fill(text);
  await field(page).press("Enter");
}

/** Until the answer is complete. */
async function answered(page, count) {
  await page.waitForFunction(
    (least) => document.querySelectorAll("#messages .message:not(.mine) .foot").length >= least,
    count,
  );
  await button(page, "Send").waitFor();
}

/** Until an answer is being written, and has some text. */
async function writing(page) {
  await button(page, "Stop the answer").waitFor();
  await page.waitForFunction(() => {
    const text = document.querySelector("#messages li:last-child .text");
    return text && !text.querySelector(".waiting") && text.textContent.length > 3;
  });
}

async function upload(page, name, text) {
  await page.getByLabel("A text file to read").setInputFiles({ name, mimeType: "text/plain", buffer: Buffer.from(text) });
}

const isWithin = (page) =>
  page.evaluate(() => document.documentElement.scrollWidth <= document.documentElement.clientWidth);

export const scenarios = {
  "send and read": {
    async play({ page, url }) {
      await open(page, url);
      assert.match(await page.locator("#base-note").innerText(), /base model/);
      assert.match(await page.locator("#model").innerText(), /tiny\s+29,728 parameters/);
      assert.match(await page.locator("#status").innerText(), /State: [\d.]+ [kM]?B, however much/);
      await say(page, "Who is there?");
      await answered(page, 1);
      assert.equal(await page.locator(".mine .text").innerText(), "Who is there?");
      assert.ok((await lastText(page).innerText()).length > 0);
      assert.match(await figures(page).innerText(), /24 tokens[^]*tokens\/s[^]*first after [^]*read[^]*cut at the limit/);
      await say(page, "And now?");
      await answered(page, 2);
      assert.match(await figures(page).innerText(), /[1-9]\d* known/);
      await page.waitForFunction(() => /^The answer: /.test(document.querySelector("[aria-live]").textContent));
    },
  },

  "stop by button and by Escape": {
    async play({ page, url }) {
      await open(page, url, { max_tokens: LONG });
      for (const [index, stop] of [
        () => button(page, "Stop the answer").click(),
        () => page.keyboard.press("Escape"),
      ].entries()) {
        await say(page, "Go on");
        await writing(page);
        await stop();
        await answered(page, index + 1);
        assert.match(await figures(page).innerText(), /at least \d+ tokens[^]*stopped/);
        await page.waitForFunction(() => document.activeElement.id === "input");
      }
    },
  },

  "again, edit, copy, export": {
    options: { permissions: ["clipboard-read", "clipboard-write"] },
    async play({ page, url }) {
      await open(page, url, { temperature: "1" });
      await say(page, "first line");
      await answered(page, 1);
      const first = await lastText(page).innerText();
      await button(page, "Another answer").click();
      await page.waitForFunction((old) => {
        const foot = document.querySelector("#messages li:last-child .foot");
        return foot && document.querySelector("#messages li:last-child .text").innerText !== old;
      }, first);
      assert.equal(await answers(page).count(), 1);

      await button(page, "Edit and send again").click();
      const editor = page.getByRole("textbox", { name: "Your message" });
      assert.equal(await editor.inputValue(), "first line");
      assert.ok(await editor.evaluate((node) => node.getBoundingClientRect().top > 56));
      await editor.press("Escape");
      await button(page, "Edit and send again").click();
      await editor.fill("second");
      await editor.press("Shift+Enter");
      await editor.pressSequentially("thought");
      await editor.press("Enter");
      await answered(page, 1);
      assert.deepEqual(await page.locator(".mine .text").allInnerTexts(), ["second\nthought"]);

      await button(page, "Copy").first().click();
      await page.waitForFunction(async () => (await navigator.clipboard.readText()) === "second\nthought");

      const [download] = await Promise.all([page.waitForEvent("download"), button(page, "Export as text").click()]);
      assert.equal(download.suggestedFilename(), "second-thought.txt");
      const text = await readFile(await download.path(), "utf8");
      assert.match(text, /^second thought\nModel: tiny\n[^]*You:\nsecond\nthought\n\ntiny:\n/);
    },
  },

  "kept and forked": {
    async play({ page, url }) {
      await open(page, url);
      await say(page, "the beginning");
      await answered(page, 1);
      await say(page, "the end");
      await answered(page, 2);
      await button(page, "Fork the conversation here").nth(1).click();
      assert.equal(await page.locator(".message").count(), 2);
      assert.equal(await chatNames(page).count(), 2);
      await say(page, "another end");
      await answered(page, 2);

      await page.reload();
      await connected(page);
      await chatNames(page).first().click();
      assert.deepEqual(await page.locator(".mine .text").allInnerTexts(), ["the beginning", "another end"]);
      await chatNames(page).nth(1).click();
      assert.deepEqual(await page.locator(".mine .text").allInnerTexts(), ["the beginning", "the end"]);

      await page.getByRole("button", { name: "Delete the beginning" }).first().click();
      await page.getByRole("dialog").getByRole("button", { name: "Keep" }).click();
      assert.equal(await chatNames(page).count(), 2);
      await page.getByRole("button", { name: "Delete the beginning" }).first().click();
      await page.getByRole("dialog").getByRole("button", { name: "Delete" }).click();
      await page.waitForFunction(() => document.querySelectorAll("#chats li").length === 1);
      assert.deepEqual(
        await page.evaluate(() => Object.keys(localStorage).filter((key) => key.includes(".chat.")).length), 1);
    },
  },

  "left while it writes, in a browser that is full": {
    async play({ page, url }) {
      await open(page, url, { max_tokens: LONG });
      await say(page, "leave me");
      await writing(page);
      await page.reload();
      await chatNames(page).first().click();
      assert.ok((await lastText(page).innerText()).length > 3);
      await page.keyboard.press("Control+k");
      await page.evaluate(() => {
        for (let size = 1 << 22; size; size >>= 1) {
          try {
            localStorage.setItem(`full ${size}`, "x".repeat(size));
          } catch {
            // smaller
          }
        }
      });
      await say(page, "no room");
      await page.getByRole("alert").filter({ hasText: /no room to keep/ }).waitFor();
      await writing(page);
    },
  },

  "two conversations at once": {
    async play({ page, url }) {
      await open(page, url, { max_tokens: LONG });
      await say(page, "slow");
      await writing(page);
      await page.keyboard.press("Control+k");
      assert.equal(await page.locator(".message").count(), 0);
      await page.locator("#max_tokens").evaluate((node) => {
        node.value = "8";
      });
      await say(page, "quick");
      await answered(page, 1);
      await chatNames(page).filter({ hasText: "slow" }).click();
      await page.keyboard.press("Escape");
      await answered(page, 1);
      assert.deepEqual(await page.locator(".mine .text").allInnerTexts(), ["slow"]);
    },
  },

  "a document": {
    async play({ page, url }) {
      await open(page, url);
      // What the bar showed is gathered in the page: it may be gone before anybody could ask.
      await page.evaluate(() => {
        window.seen = [];
        const bar = document.getElementById("reading-bar");
        const note = () => bar.hasAttribute("value") && window.seen.push(bar.value / bar.max);
        new MutationObserver(note).observe(bar, { attributes: true });
      });
      await upload(page, "sea.txt", "The sea is salt as the tears are. ".repeat(1500));
      const entry = documents(page).getByRole("button", { name: /^sea\.txt/ });
      await entry.waitFor();
      const seen = await page.evaluate(() => window.seen);
      assert.ok(seen.length > 2 && seen.every((one, i) => one <= 1 && (i === 0 || one >= seen[i - 1])), `${seen}`);
      assert.ok(seen.some((one) => one > 0 && one < 1), `${seen}`);
      assert.match(await entry.innerText(), /51,000 tokens \u00b7 [\d.]+ [kM]?B/);
      assert.equal(await entry.getAttribute("aria-pressed"), "true");
      assert.match(await page.locator("#chosen").innerText(), /After sea\.txt/);

      for (const pressed of ["false", "true"]) {
        await entry.press("Enter");
        assert.equal(await entry.getAttribute("aria-pressed"), pressed);
        assert.ok(await entry.evaluate((node) => node === document.activeElement), "the focus is kept");
      }

      await say(page, "What is salt?");
      await answered(page, 1);
      assert.match(await figures(page).innerText(), /51,000 known/);

      await page.keyboard.press("Control+k");
      assert.ok(await page.locator("#chosen").isHidden());
      await chatNames(page).first().click();
      assert.ok(await page.locator("#chosen").isVisible());

      await button(page, "Fork sea.txt").click();
      await documents(page).getByRole("button", { name: /^sea\.txt \(copy\)/ }).waitFor();
      await page.reload();
      await documents(page).getByRole("button", { name: /^sea\.txt \(copy\)/ }).waitFor();
      for (const name of ["sea.txt", "sea.txt (copy)"]) {
        await button(page, `Delete ${name}`).click();
        await page.getByRole("dialog").getByRole("button", { name: "Delete" }).click();
        await button(page, `Delete ${name}`).waitFor({ state: "detached" });
      }
      // The conversation still names it.
      await chatNames(page).first().click();
      await say(page, "Still there?");
      await page.getByRole("alert").filter({ hasText: /no longer on the server/ }).waitFor();
      await button(page, "Without sea.txt").click();
      await button(page, "Try again").click();
      await answered(page, 2);
    },
  },

  "documents that cannot be read": {
    async play({ page, url }) {
      await open(page, url);
      const told = (pattern) => documents(page).getByRole("alert").filter({ hasText: pattern }).waitFor();
      await upload(page, "picture.txt", Buffer.from([0xff, 0xfe, 0x00, 0x80]));
      await told(/not a UTF-8 text/);
      await upload(page, "none.txt", " \n");
      await told(/none\.txt is empty/);
      await upload(page, "large.txt", "x".repeat(5 << 20));
      await told(/more than this server takes/);
      await upload(page, "long.txt", "a long way to go ".repeat(100_000));
      await page.getByRole("progressbar", { name: "long.txt" }).waitFor();
      await button(page, "Cancel").click();
      await page.getByRole("progressbar").waitFor({ state: "hidden" });
      assert.equal(await documents(page).getByRole("alert").count(), 0);
      assert.equal(await page.locator("#document-list li").filter({ hasText: "long.txt" }).count(), 0);
    },
  },

  "light and dark": {
    options: { colorScheme: "dark" },
    async play({ page, url }) {
      const dark = () => page.evaluate(() => {
        const [red] = getComputedStyle(document.body).backgroundColor.match(/\d+/);
        return Number(red) < 100;
      });
      await open(page, url);
      assert.equal(await dark(), true);
      await button(page, "Theme: system").click();
      assert.equal(await dark(), false);
      await page.reload();
      assert.equal(await dark(), false);
      await button(page, "Theme: light").click();
      assert.equal(await dark(), true);
      await page.emulateMedia({ colorScheme: "light" });
      assert.equal(await dark(), true);
      await button(page, "Theme: dark").click();
      assert.equal(await dark(), false);
    },
  },

  "colours can be told apart": {
    async play({ page, url }) {
      await open(page, url);
      await say(page, "colours");
      await answered(page, 1);
      await button(page, "Settings").click();
      for (const colorScheme of ["light", "dark"]) {
        await page.emulateMedia({ colorScheme });
        const low = await page.evaluate(lowContrast);
        assert.deepEqual(low, [], colorScheme);
      }
    },
  },

  "by keyboard alone": {
    async play({ page, url }) {
      await open(page, url);
      const focused = () => page.evaluate(() => {
        const node = document.activeElement;
        const style = getComputedStyle(node);
        const ring = style.outlineStyle !== "none" || getComputedStyle(node.closest("form") ?? node).boxShadow !== "none";
        return { name: node.ariaLabel || node.labels?.[0]?.textContent || node.textContent.trim(), ring };
      });
      await page.keyboard.type("one");
      await page.keyboard.press("Shift+Enter");
      await page.keyboard.type("two");
      await page.keyboard.press("Enter");
      await answered(page, 1);
      assert.deepEqual(await page.locator(".mine .text").allInnerTexts(), ["one\ntwo"]);

      // From the start of the page every control is reached, in the order in which it is read, and shows it.
      await page.locator(".skip").focus();
      const order = [(await focused()).name];
      for (let i = 0; i < 60 && order.at(-1) !== "Send"; i++) {
        await page.keyboard.press("Tab");
        const { name, ring } = await focused();
        assert.ok(ring, `no ring at ${name}`);
        order.push(name);
      }
      const wanted = ["Skip to the message field", "New chatCtrl K", "one two", "Delete one two", "Add a document",
        "Conversations and documents", "Fork this conversation", "Export as text", "Theme: system", "Settings",
        "Conversation", "Copy", "Edit and send again", "Another answer", "Message", "Send"];
      assert.deepEqual(order.filter((name) => wanted.includes(name) && name !== "Copy"), wanted.filter((name) => name !== "Copy"));

      await button(page, "Settings").press("Enter");
      await page.getByRole("spinbutton", { name: "Temperature" }).fill("9");
      await say(page, "too hot");
      assert.equal((await focused()).name, "Temperature");
      assert.equal(await page.getByRole("spinbutton", { name: "Temperature" }).getAttribute("aria-invalid"), "true");
      assert.equal(await page.locator(".mine").count(), 1);
      await page.keyboard.press("Control+a");
      await page.keyboard.type("0.5");
      await field(page).press("Enter");
      await answered(page, 2);
      await page.keyboard.press("Control+k");
      assert.equal((await focused()).name, "Message");
      assert.equal(await page.locator(".message").count(), 0);
    },
  },

  "on a phone": {
    options: { viewport: { width: 360, height: 740 }, hasTouch: true, isMobile: true, reducedMotion: "reduce" },
    async play({ page, url }) {
      await open(page, url);
      assert.ok(await isWithin(page));
      await say(page, `${"x".repeat(300)} ${"words and ".repeat(30)}`);
      await answered(page, 1);
      assert.ok(await isWithin(page));
      await button(page, "Conversations and documents").tap();
      const panel = page.getByRole("complementary", { name: "Conversations and documents" });
      await panel.waitFor();
      assert.ok(await isWithin(page));
      assert.equal(await page.evaluate(() => document.activeElement.id), "close-side");
      assert.ok(await page.evaluate(() => document.getElementById("main").inert));
      await page.keyboard.press("Escape");
      await panel.waitFor({ state: "hidden" });
      await button(page, "Settings").tap();
      assert.ok(await isWithin(page));
      await button(page, "Close the settings").tap();
      assert.equal(await page.evaluate(() => document.activeElement.id), "toggle-settings");
      // A document that was read or chosen uncovers the conversation: now one asks about it.
      await button(page, "Conversations and documents").tap();
      await panel.waitFor();
      await upload(page, "phone.txt", "The sea is salt. ".repeat(20));
      await panel.waitFor({ state: "hidden" });
      assert.match(await page.locator("#chosen").innerText(), /After phone\.txt/);
      await page.waitForFunction(() => document.activeElement.id === "input");
      await button(page, "Conversations and documents").tap();
      const one = documents(page).locator("#document-list button.entry").filter({ hasText: "phone.txt" }).first();
      await one.tap(); // without it: the list stays
      await page.waitForFunction(() => document.getElementById("chosen").hidden);
      await one.tap();
      await panel.waitFor({ state: "hidden" });
      const small = await page.evaluate(() => [...document.querySelectorAll("button")]
        .filter((one) => one.offsetParent && Math.min(one.offsetWidth, one.offsetHeight) < 24).map((one) => one.id));
      assert.deepEqual(small, []);
      assert.equal(await page.evaluate(() => document.getAnimations().length), 0);
    },
  },

  "text stays text": {
    expected: /requires 'TrustedHTML'/,
    async play({ page, url }) {
      await open(page, url);
      await upload(page, "<img src=x onerror=alert(1)>.txt", IMAGE);
      await page.locator("#document-list li").filter({ hasText: IMAGE }).first().waitFor();
      await page.getByRole("button", { name: "Settings" }).click();
      await page.getByRole("textbox", { name: "System text" }).fill(`<script>alert(2)</script>`);
      await say(page, IMAGE);
      await answered(page, 1);
      assert.equal(await page.locator(".mine .text").innerText(), IMAGE);
      assert.equal(await page.locator("#title").innerText(), IMAGE);
      await page.reload();
      await chatNames(page).first().click();
      assert.equal(await page.locator("#messages img, #messages script, #chats img, #document-list img").count(), 0);
      // Even code that tried could not.
      const refused = await page.evaluate(() => {
        try {
          document.body.innerHTML = "<b>x</b>";
          return false;
        } catch (error) {
          return error instanceof TypeError;
        }
      }).catch(() => false);
      assert.ok(refused);
    },
  },

  "the model's text stays text": {
    async play({ page, url, says }) {
      await open(page, url, { max_tokens: "60" });
      await say(page, "Say it");
      await answered(page, 1);
      assert.ok((await lastText(page).innerText()).includes(says), await lastText(page).innerText());
      assert.equal(await page.locator("#xyz").count(), 0);
    },
  },

  "an API key": {
    async play({ page, url, key }) {
      await page.goto(url);
      await page.getByRole("alert").filter({ hasText: /API key/ }).waitFor();
      const entry = page.getByLabel("API key");
      await page.waitForFunction(() => document.activeElement.id === "key");
      await entry.fill("wrong");
      await entry.press("Enter");
      await page.getByRole("alert").filter({ hasText: /does not take this API key/ }).waitFor();
      await entry.fill(key);
      await entry.press("Enter");
      await connected(page);
      assert.equal(await page.getByRole("alert").count(), 0);
      await page.locator("#max_tokens").fill("5");
      await say(page, "May I?");
      await answered(page, 1);
      assert.equal(await page.evaluate(() => JSON.stringify(localStorage).includes("key-of")), false);
      await page.reload(); // the same tab
      await connected(page);
    },
  },

  "too busy": {
    async play({ page, url }) {
      await open(page, url, { max_tokens: LONG });
      await say(page, "I am first");
      await writing(page);
      await page.keyboard.press("Control+k");
      await say(page, "I am second");
      const alert = page.getByRole("alert").filter({ hasText: /too much to do just now\. Try again in \d+ s/ });
      await alert.waitFor();
      assert.ok(await alert.getByRole("button").isDisabled());
      await chatNames(page).filter({ hasText: "first" }).click();
      await button(page, "Stop the answer").click();
      await chatNames(page).filter({ hasText: "second" }).click();
      // The place is free a moment after the stop: until then the page counts down again.
      for (let tries = 0; tries === 0 || (await alert.count()); tries++) {
        assert.ok(tries < 10);
        await button(page, "Try again").click();
        await page.waitForFunction(() => {
          const text = document.querySelector("#messages li:last-child .text");
          return document.querySelector("#messages [role=alert]") || (text.textContent && !text.querySelector(".waiting"));
        });
      }
      await writing(page);
      assert.equal(await page.getByRole("alert").count(), 0);
      assert.equal(await answers(page).count(), 1);
    },
  },

  "the server is killed": {
    async play({ page, url, pid }) {
      await open(page, url, { max_tokens: LONG });
      await say(page, "Go on for long");
      await writing(page);
      process.kill(pid, "SIGKILL");
      await page.getByRole("alert").filter({ hasText: /connection to the server was lost/ }).waitFor();
      assert.ok((await lastText(page).innerText()).length > 3, "what came stays");
      await button(page, "Try again").click();
      await page.getByRole("alert").filter({ hasText: /does not answer/ }).waitFor();
      await say(page, "Hello?");
      await page.getByRole("alert").filter({ hasText: /does not answer/ }).nth(1).waitFor();
      assert.equal(await page.locator("#messages").getByRole("button", { name: "Try again" }).count(), 1);
      assert.deepEqual(await page.locator(".mine .text").allInnerTexts(), ["Go on for long", "Hello?"]);
    },
  },
};

/** In the page: texts whose contrast with what is behind them is below 4.5 to 1. */
function lowContrast() {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colors) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) {
      canvas.fillStyle = color;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (colors) => {
    const [r, g, b] = rgb(colors).map((one) => (one / 255 <= 0.04045 ? one / 255 / 12.92 : ((one / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const low = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.closest(":disabled") || node.matches(".skip, .hidden")) continue;
    const behind = [];
    for (let each = node; each; each = each.parentElement) behind.unshift(getComputedStyle(each).backgroundColor);
    const [a, b] = [light(behind), light([...behind, getComputedStyle(node).color])].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push(`${node.tagName}.${node.className} ${node.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return low;
}
