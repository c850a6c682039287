// The chat page: one conversation, replies as they are generated, stop, regenerate, edit.

import { ApiError, modelName, streamReply } from "./api.js";
import { element, parseBlocks, showBlocks } from "./markdown.js";
import { apiKey, samplingFields, setUpSettings, setUpTheme, systemPrompt } from "./settings.js";

const byId = (id) => document.getElementById(id);
const input = byId("input");
const list = byId("messages");

/** Messages in order, {role, content, reasoning, note, node}; the last one is the reply while `running`. */
let messages = [];
let running = null; // the AbortController of the reply in progress

// --- the conversation on the page ---

function addMessage(role, content) {
  const node = element("article", `message ${role}`);
  node.setAttribute("aria-label", role === "user" ? "You" : "Reply");
  node.append(element("div", role === "user" ? "body" : "body markdown"), element("div", "actions"));
  const message = { role, content, reasoning: "", node, note: "" };
  messages.push(message);
  list.append(node);
  show(message);
  return message;
}

function show(message) {
  const body = message.node.querySelector(".body");
  if (message.role === "user") body.textContent = message.content;
  else showBlocks(body, parseBlocks(message.content));
  if (message.reasoning) showReasoning(message);
}

function showReasoning(message) {
  let details = message.node.querySelector("details");
  if (!details) {
    details = element("details");
    details.append(element("summary", "", "Reasoning"), element("div"));
    message.node.prepend(details);
  }
  details.lastChild.textContent = message.reasoning;
}

function truncate(length) {
  for (const message of messages.splice(length)) message.node.remove();
}

/** Buttons and notes that depend on the state of the conversation. */
function refresh() {
  const busy = running !== null;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("new-chat").disabled = messages.length === 0;
  byId("empty").hidden = messages.length > 0;
  messages.forEach((message, index) => {
    const isLast = index === messages.length - 1;
    message.node.classList.toggle("running", busy && isLast);
    const actions = message.node.lastChild;
    actions.replaceChildren();
    if (busy && isLast) return;
    if (message.role === "user") actions.append(button("Edit", () => edit(index), busy));
    else {
      actions.append(button("Copy", (clicked) => copy(message.content, clicked)));
      if (isLast) actions.append(button("Regenerate", () => regenerate(), busy));
      if (message.note) actions.append(element("span", "note", message.note));
    }
  });
}

function button(text, action, disabled = false) {
  const node = element("button", "", text);
  node.type = "button";
  node.disabled = disabled;
  node.addEventListener("click", () => action(node));
  return node;
}

async function copy(text, clicked) {
  const label = clicked.textContent;
  try {
    await navigator.clipboard.writeText(text);
    clicked.textContent = "Copied";
  } catch {
    clicked.textContent = "Not allowed";
  }
  setTimeout(() => (clicked.textContent = label), 1500);
}

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

const page = document.scrollingElement;
const atEnd = () => page.scrollHeight - page.scrollTop - page.clientHeight < 60;
const scrollToEnd = () => page.scrollTo({ top: page.scrollHeight });

// --- generating ---

async function reply() {
  const conversation = messages.map(({ role, content }) => ({ role, content }));
  if (systemPrompt().trim()) conversation.unshift({ role: "system", content: systemPrompt() });
  const message = addMessage("assistant", "");
  running = new AbortController();
  const { signal } = running;
  showError("");
  byId("stats").textContent = "";
  refresh();
  scrollToEnd();
  const body = { messages: conversation, ...samplingFields() };
  try {
    await receive(message, streamReply(body, apiKey(), signal));
  } catch (error) {
    if (signal.aborted) message.note = "stopped";
    else if (error instanceof ApiError) showError(error.message);
    else showError("The connection to the server was lost.");
  }
  running = null;
  show(message);
  if (!message.content && !message.reasoning && !message.note && messages.at(-1) === message) truncate(messages.length - 1);
  refresh();
  input.focus();
}

async function receive(message, events) {
  const started = performance.now();
  let first = 0;
  let frame = 0;
  for await (const event of events) {
    if (event.text || event.reasoning) {
      first ||= performance.now();
      message.content += event.text ?? "";
      message.reasoning += event.reasoning ?? "";
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        const follow = atEnd();
        show(message);
        if (follow) scrollToEnd();
      });
    }
    if (event.finishReason === "length") message.note = "ended at the maximum of tokens";
    else if (event.finishReason && !message.content) message.note = "no text";
    if (event.usage) showStats(event.usage, first || performance.now(), started);
  }
}

function showStats(usage, first, started) {
  const tokens = usage.completion_tokens;
  const speed = (tokens - 1) / ((performance.now() - first) / 1000);
  const parts = [`${usage.prompt_tokens} + ${tokens} tokens`, `first after ${((first - started) / 1000).toFixed(2)} s`];
  if (tokens > 1 && Number.isFinite(speed)) parts.push(`${speed.toFixed(0)} tokens/s`);
  byId("stats").textContent = parts.join(" · ");
}

function send() {
  const text = input.value.trim();
  if (!text || running) return;
  if (messages.at(-1)?.role === "user") truncate(messages.length - 1); // its reply has failed: this one replaces it
  input.value = "";
  resize();
  addMessage("user", text);
  reply();
}

function regenerate() {
  truncate(messages.length - 1);
  reply();
}

/** Replace a message by a field; sending it drops what follows. */
function edit(index) {
  const message = messages[index];
  const body = message.node.querySelector(".body");
  const editor = element("form", "edit");
  const field = element("textarea");
  const actions = element("div", "actions");
  const save = element("button", "primary", "Send");
  field.value = message.content;
  field.rows = Math.min(10, message.content.split("\n").length + 1);
  field.setAttribute("aria-label", "Edit message");
  actions.append(button("Cancel", close), save);
  editor.append(field, actions);
  editor.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (!text || running) return;
    truncate(index);
    addMessage("user", text);
    reply();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    else if (isSendKey(event)) {
      event.preventDefault();
      editor.requestSubmit();
    }
  });
  body.replaceWith(editor);
  message.node.lastChild.hidden = true;
  field.focus();

  function close() {
    editor.replaceWith(body);
    message.node.lastChild.hidden = false;
    refresh();
  }
}

// --- the field and the buttons ---

const isSendKey = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function resize() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
input.addEventListener("input", resize);
input.addEventListener("keydown", (event) => {
  if (isSendKey(event)) {
    event.preventDefault();
    send();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("settings").open) running?.abort();
});
byId("new-chat").addEventListener("click", () => {
  running?.abort();
  truncate(0);
  showError("");
  byId("stats").textContent = "";
  refresh();
  input.focus();
});
list.addEventListener("click", (event) => {
  const clicked = event.target.closest(".code .copy");
  if (clicked) copy(clicked.closest(".code").querySelector("code").textContent, clicked);
});

async function showModel() {
  try {
    byId("model").textContent = await modelName(apiKey());
    showError("");
  } catch (error) {
    showError(error instanceof ApiError ? error.message : "The server does not answer.");
  }
}

setUpTheme();
setUpSettings(showModel);
refresh();
showModel();
