// Opens a page in Chromium and tells, as JSON, what a reader would see of it: node look.mjs BROWSER FILE WIDTH SCHEME.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const { chromium } = createRequire(new URL("../serve/js/", import.meta.url))("playwright-core");
const [executablePath, file, width, colorScheme] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu", "--no-first-run"] });
const page = await browser.newPage({ viewport: { width: Number(width), height: 800 }, colorScheme });
const complaints = [];
const requests = [];
page.on("console", (message) => complaints.push(message.text()));
page.on("pageerror", (error) => complaints.push(error.message));
page.on("request", (request) => requests.push(request.url()));
await page.goto(pathToFileURL(file).href);
const seen = await page.evaluate(() => {
  const shown = (selector) => [...document.querySelectorAll(selector)].filter((e) => e.getBoundingClientRect().width > 0);
  const style = (element) => getComputedStyle(element);
  const plots = shown("svg.plot");
  return {
    sideways: document.documentElement.scrollWidth - innerWidth,
    ground: style(document.documentElement).backgroundColor,
    ink: style(document.body).color,
    wide: shown("svg.wide").length,
    narrow: shown("svg.narrow").length,
    outside: plots.filter((plot) => plot.getBoundingClientRect().right > innerWidth).length,
    letters: Math.min(...plots.flatMap((plot) => [...plot.querySelectorAll("text")]).map((e) => e.getBoundingClientRect().height)),
    line: style(document.querySelector("svg.plot .c0-stroke")).stroke,
    axis: style(document.querySelector("svg.plot .i-stroke")).stroke,
    selected: (getSelection().selectAllChildren(plots[0]), getSelection().toString().length),
  };
});
console.log(JSON.stringify({ ...seen, complaints, requests: requests.length }));
await browser.close();
