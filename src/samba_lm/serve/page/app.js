// The page put together: panels, the list of conversations, the field to write in, keys.

import { Api } from "./api.js";
import { Chats, asText, title } from "./chats.js";
import { Conversation } from "./conversation.js";
import { Documents } from "./documents.js";
import { announce, ask, byId, el, iconButton, notice, refill } from "./dom.js";
import { isSend } from "./messages.js";
import { Panels } from "./panels.js";
import { Settings } from "./settings.js";
import { amount, brief, bytes, tokens } from "./words.js";

const api = new Api();
const chats = new Chats();
const settings = new Settings(api);
const panels = new Panels();
const input = byId("input");
let model = null;

const conversation = new Conversation(api, chats, settings, {
  onChange: drawList,
  onKey: needKey,
  onWrong(field) {
    panels.open("settings");
    field.focus();
    field.reportValidity();
  },
  onMissing: () => documents.load(),
  onFull() {
    byId("server-notice").replaceChildren(
      notice("This browser has no room to keep the conversation: export it, or delete others."),
    );
  },
});
const documents = new Documents(api, {
  chat: () => conversation.chat,
  onChoose: choose,
  onKey: needKey,
});

// --- the server ---

async function connect() {
  const place = byId("server-notice");
  try {
    model = await api.model();
  } catch (error) {
    place.replaceChildren(notice(error.message, { label: "Try again", run: connect }, error.retrySeconds));
    if (error.status === 401) needKey();
    return;
  }
  place.replaceChildren();
  conversation.model = model.id;
  settings.limit(model.max_tokens);
  byId("base-note").hidden = model.chat_template === true;
  if (model.chat_template === false) {
    byId("base-note").textContent = "This is a base model: it goes on with text and does not follow instructions.";
  }
  drawModel();
  await documents.load();
}

function drawModel() {
  byId("model").replaceChildren(
    el("p", { class: "name clip" }, model.id),
    el("p", { class: "hint" }, `${amount(model.parameters)} parameters`),
  );
  byId("status").textContent = stateText();
}

function stateText() {
  const size = bytes(model.state_bytes);
  return model.constant_state
    ? `State: ${size}, however much it has read`
    : `State: ${size}, and it grows with what was read`;
}

function needKey() {
  settings.needKey();
  panels.open("settings");
  byId("key").focus();
}

settings.onKey = connect;

// --- conversations ---

function drawList() {
  const items = chats.list().map((chat) => {
    const shown = chat.id === conversation.chat.id;
    const open = el(
      "button",
      {
        type: "button",
        class: "entry",
        "aria-current": shown ? "true" : null,
        "data-focus": chat.id,
        on: { click: () => openChat(chat) },
      },
      el("span", { class: "clip" }, title(chat)),
      conversation.running.has(chat.id) ? el("span", { class: "hint" }, "writing") : null,
    );
    const remove = iconButton("bin", `Delete ${title(chat)}`, () => removeChat(chat));
    return el("li", { class: shown ? "item on" : "item" }, open, el("div", { class: "tools" }, remove));
  });
  refill(byId("chats"), items);
  byId("chats-title").hidden = !items.length;
  drawChosen();
}

function openChat(chat) {
  conversation.open(chat);
  documents.draw();
  panels.closeOverlay();
  input.focus();
}

function newChat() {
  openChat(chats.create());
  announce("A new chat");
}

async function removeChat(chat) {
  if (!(await ask(`Delete the conversation \u201c${title(chat)}\u201d?`))) return;
  conversation.drop(chat);
  chats.remove(chat.id);
  if (chat.id === conversation.chat.id) newChat();
  else drawList();
  byId("new-chat").focus();
  announce("The conversation is deleted");
}

chats.onChange = () => {
  // Another tab wrote. What is being written here stays as it is.
  if (!conversation.busy && chats.all.has(conversation.chat.id)) conversation.open(chats.all.get(conversation.chat.id));
  else drawList();
};

// --- the document of the conversation ---

function choose(context) {
  const { chat } = conversation;
  chat.context = context && { id: context.id, title: context.title, tokens: context.tokens };
  chats.save(chat, false);
  documents.draw();
  drawChosen();
  if (!context) return;
  announce(`The conversation goes on from ${context.title}`);
  if (panels.closeOverlay("side")) input.focus(); // what comes next is a question
}

function drawChosen() {
  const { context } = conversation.chat;
  const place = byId("chosen");
  place.hidden = !context;
  place.replaceChildren();
  if (!context) return;
  place.append(
    el("span", { class: "clip" }, "After ", el("strong", {}, context.title)),
    el("span", { class: "hint" }, tokens(context.tokens)),
    iconButton("close", `Without ${context.title}`, () => {
      choose(null);
      input.focus();
    }),
  );
}

// --- writing ---

function send() {
  if (!conversation.send(input.value)) return;
  input.value = "";
  grow();
}

/** As high as its text, up to a limit of the style sheet. */
function grow() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

input.addEventListener("input", grow);
input.addEventListener("keydown", (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  send();
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
  input.focus();
});
byId("stop").addEventListener("click", () => conversation.stop());
byId("new-chat").addEventListener("click", newChat);
byId("fork-chat").addEventListener("click", () => conversation.fork(conversation.chat.messages.length));
byId("export").addEventListener("click", () => {
  const text = asText(conversation.chat, model?.id ?? "Model");
  const url = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  const name = brief(title(conversation.chat), 40).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  el("a", { href: url, download: `${name || "chat"}.txt` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
});

addEventListener("pagehide", () => conversation.keep());
addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.isComposing) return;
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    newChat();
  } else if (event.key === "Escape" && !byId("ask").open) {
    if (!panels.closeOverlay()) conversation.stop();
  }
});

if (/Mac|iP(hone|ad)/.test(navigator.platform)) {
  for (const key of document.querySelectorAll("kbd")) key.textContent = key.textContent.replace("Ctrl", "\u2318");
}

conversation.draw();
grow();
connect();
if (!panels.narrow) input.focus();
