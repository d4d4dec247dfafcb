// Plays scenarios of the web page in Chromium, one a line of standard input: {"name", "url", ...}. Answers each with a
// line: {"error": null or text}. Every scenario gets a browser profile of its own.

import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

import { scenarios } from "./scenarios.mjs";

const QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const PATIENCE = 15_000; // milliseconds

async function play(browser, { name, ...given }) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, ...scenarios[name].options });
  context.setDefaultTimeout(PATIENCE);
  const wrong = [];
  const page = await context.newPage();
  page.on("pageerror", (error) => wrong.push(`error on the page: ${error.message}`));
  page.on("dialog", (dialog) => {
    wrong.push(`a dialog: ${dialog.message()}`);
    dialog.dismiss();
  });
  page.on("request", (request) => {
    if (!/^(http:\/\/127\.0\.0\.1:|blob:)/.test(request.url())) wrong.push(`a request to ${request.url()}`);
  });
  page.on("console", (message) => {
    const { expected } = scenarios[name];
    if (/content security|trusted/i.test(message.text()) && !expected?.test(message.text())) wrong.push(`the policy was broken: ${message.text()}`);
  });
  try {
    await scenarios[name].play({ page, context, ...given });
    return wrong.length ? wrong.join("\n") : null;
  } catch (error) {
    const shown = await page.locator("body").innerText({ timeout: 1000 }).catch(() => "nothing");
    return [error.stack, ...wrong, `The page showed:\n${shown}`].join("\n");
  } finally {
    await context.close();
  }
}

const browser = await chromium.launch({ executablePath: process.argv[2], args: QUIET });
for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${JSON.stringify({ error: await play(browser, JSON.parse(line)) })}\n`);
}
await browser.close();
