/* The conversation. */

import { answer, forget } from "./api.js";
import { element, figuresOf, piecesOf, putPieces, showSource, writePieces } from "./marks.js";

const STORE = "copyspec conversation";
const at = (id) => document.getElementById(id);

/** A conversation of this tab: it outlives a reload, and nothing else. */
export class Chat {
  constructor(modelName, say) {
    this.modelName = modelName;
    this.say = say;
    const kept = JSON.parse(sessionStorage.getItem(STORE) ?? "null");
    this.session = kept?.session ?? crypto.randomUUID();
    this.messages = kept?.messages ?? [];
    this.running = null;
    this.show();
  }

  /** Ask for an answer to what has been said. */
  async ask(text) {
    if (this.running) return;
    if (text !== undefined) this.messages.push({ role: "user", content: text });
    const shown = this.messages.map(({ role, content }) => ({ role, content }));
    const system = at("system").value.trim();
    const sources = [...(system ? [system] : []), ...shown.map((message) => message.content)];
    const said = { role: "assistant", content: "", sources };
    this.show();
    const item = this.itemOf(said, this.messages.length);
    at("messages").append(item);
    item.scrollIntoView({ block: "end" });
    this.begin();
    try {
      await this.write(item, said, shown);
      this.messages.push(said);
    } catch (error) {
      if (error.name === "AbortError") {
        if (said.content) this.messages.push({ ...said, figures: "stopped" });
      } else {
        this.say(error.message);
        if (text !== undefined) at("say").value = this.messages.pop().content;
      }
    } finally {
      this.end();
    }
  }

  async write(item, said, messages) {
    const body = item.querySelector(":scope > .text"), began = performance.now();
    let stats, usage, explanation, reasoning = "";
    for await (const event of answer({ model: this.modelName(), session: this.session, messages, signal: this.running.signal })) {
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        if (choice.delta.reasoning_content) {
          reasoning += choice.delta.reasoning_content;
          this.think(item, reasoning);
        }
        said.content += choice.delta.content ?? "";
        const segments = choice.copyspec?.segments;
        if (choice.delta.content && segments && !reasoning) writePieces(body, segments);
        else if (choice.delta.content) writePieces(body, [{ text: choice.delta.content, copied: false }]);
        stats = choice.copyspec?.stats ?? stats;
        explanation = choice.copyspec?.explanation ?? explanation;
      }
      const isAtEnd = innerHeight + scrollY > document.body.scrollHeight - 200;
      if (isAtEnd) item.scrollIntoView({ block: "end", behavior: "instant" });
    }
    said.figures = figuresOf(stats, usage, (performance.now() - began) / 1000);
    said.explanation = explanation;
    said.reasoning = reasoning;
  }

  think(item, reasoning) {
    const shown = item.querySelector(".reasoning");
    shown.hidden = !reasoning;
    shown.lastChild.textContent = reasoning;
  }

  begin() {
    this.running = new AbortController();
    this.say("");
    at("stop").hidden = false;
    at("messages").setAttribute("aria-busy", "true");
  }

  end() {
    this.running = null;
    at("stop").hidden = true;
    at("messages").removeAttribute("aria-busy");
    this.show();
    this.keep();
  }

  stop() {
    this.running?.abort();
  }

  /** Forget all that was said, here and in the server. */
  async clear() {
    this.stop();
    const before = this.session;
    this.session = crypto.randomUUID();
    this.messages = [];
    this.show();
    this.keep();
    try {
      await forget(before);
    } catch (error) {
      this.say(`The server was not told to forget the conversation: ${error.message}`);
    }
  }

  /** Write the last answer anew. */
  regenerate() {
    if (this.running) return;
    this.messages.pop();
    this.ask();
  }

  /** Take back a message and all behind it, to say it in another way. */
  edit(index) {
    if (this.running) return;
    at("say").value = this.messages[index].content;
    this.messages.length = index;
    this.show();
    this.keep();
    at("say").focus();
  }

  exported() {
    const messages = this.messages.map(({ role, content }) => ({ role, content }));
    return JSON.stringify({ session_id: this.session, messages }, null, 2);
  }

  keep() {
    try {
      sessionStorage.setItem(STORE, JSON.stringify({ session: this.session, messages: this.messages }));
    } catch (error) {
      this.say(`A reload will lose this conversation: ${error.message}`);
    }
  }

  show() {
    at("messages").replaceChildren(...this.messages.map((message, index) => this.itemOf(message, index)));
  }

  itemOf(message, index) {
    const item = element("li", undefined, message.role), body = element("div", undefined, "text");
    item.append(element("p", message.role === "user" ? "You" : "Answer", "hidden"));
    if (message.role === "user") {
      body.textContent = message.content;
    } else {
      const thoughts = element("details", undefined, "reasoning");
      thoughts.append(element("summary", "Reasoning"), element("div", message.reasoning ?? "", "text"));
      thoughts.hidden = !message.reasoning;
      item.append(thoughts);
      const show = (span, text, mark) => showSource(span, text, message.sources, mark);
      putPieces(body, piecesOf(message.content, message.explanation), show);
    }
    item.append(body, this.toolsOf(message, index));
    return item;
  }

  toolsOf(message, index) {
    const tools = element("div", undefined, "tools");
    const button = (name, act) => {
      const made = element("button", name);
      made.type = "button";
      made.addEventListener("click", act);
      tools.append(made);
    };
    if (message.figures) tools.append(element("span", message.figures, "figures"));
    if (message.role === "user") button("Edit", () => this.edit(index));
    else if (index === this.messages.length - 1) button("Regenerate", () => this.regenerate());
    return tools;
  }
}
