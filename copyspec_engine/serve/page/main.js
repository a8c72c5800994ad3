/* Joins the page's parts: buttons, tabs, keys and files. */

import { models } from "./api.js";
import { Chat } from "./chat.js";
import { Editor } from "./document.js";
import { hideSource } from "./marks.js";

const at = (id) => document.getElementById(id);
const say = (text) => { at("status").textContent = text; };

let model = null;
const modelName = () => {
  if (model === null) throw new Error("The server's model is not known yet: check the API key");
  return model;
};

async function findModel() {
  try {
    [model] = await models();
    at("model").textContent = model;
    say("");
  } catch (error) {
    at("model").textContent = "";
    at("options").open = true;
    say(error.message);
  }
}

function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

function choose(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const isChosen = other === tab;
    other.setAttribute("aria-selected", String(isChosen));
    other.tabIndex = isChosen ? 0 : -1;
    at(other.getAttribute("aria-controls")).hidden = !isChosen;
  }
  tab.focus();
}

const chat = new Chat(modelName, say), editor = new Editor(modelName, say);

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("say").value.trim();
  if (!text || chat.running) return;
  at("say").value = "";
  chat.ask(text);
});
at("say").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("composer").requestSubmit();
});
at("stop").addEventListener("click", () => chat.stop());
at("new").addEventListener("click", () => chat.clear());
at("save").addEventListener("click", () => download("conversation.json", chat.exported(), "application/json"));

at("editor").addEventListener("submit", (event) => {
  event.preventDefault();
  editor.edit();
});
at("edit-stop").addEventListener("click", () => editor.stop());
at("undo").addEventListener("click", () => editor.undo());
at("download").addEventListener("click", () => download("document.txt", at("text").value, "text/plain"));
for (const kind of ["dragover", "dragleave", "drop"]) {
  at("text").addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    at("text").classList.toggle("dropping", kind === "dragover");
    if (kind === "drop") editor.open(event.dataTransfer.files[0]);
  });
}

at("source-close").addEventListener("click", hideSource);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !at("source").hidden) hideSource();
});
for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") choose(tab.nextElementSibling ?? tab.previousElementSibling);
  });
}
at("key").addEventListener("change", findModel);
at("options").querySelector("form").addEventListener("submit", (event) => event.preventDefault());
findModel();
