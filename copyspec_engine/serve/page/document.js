/* A document that is edited by telling the model what to change. */

import { answer } from "./api.js";
import { difference } from "./diff.js";
import { element, figuresOf, letters, piecesOf } from "./marks.js";

const at = (id) => document.getElementById(id);

export class Editor {
  constructor(modelName, say) {
    this.modelName = modelName;
    this.say = say;
    this.session = crypto.randomUUID();
    this.versions = [];
    this.running = null;
  }

  /** Ask for the document with a change; it takes the old one's place when it is whole. */
  async edit() {
    if (this.running) return;
    const before = at("text").value, wanted = at("edit").value.trim();
    const messages = [{ role: "user", content: before }, { role: "user", content: wanted }];
    this.begin();
    const began = performance.now();
    let text = "", explanation, stats, usage;
    try {
      for await (const event of answer({
        model: this.modelName(), session: this.session, messages, prediction: before, signal: this.running.signal,
      })) {
        usage = event.usage ?? usage;
        for (const choice of event.choices) {
          text += choice.delta.content ?? "";
          stats = choice.copyspec?.stats ?? stats;
          explanation = choice.copyspec?.explanation ?? explanation;
        }
        at("diff").textContent = text;
      }
      this.versions.push(before);
      at("text").value = text;
      showDifference(before, text, explanation);
      at("edit-figures").textContent = figuresOf(stats, usage, (performance.now() - began) / 1000);
    } catch (error) {
      at("result").hidden = true;
      this.say(error.name === "AbortError" ? "Stopped: the document is as it was." : error.message);
    } finally {
      this.running = null;
      at("edit-stop").hidden = true;
      at("undo").disabled = !this.versions.length;
      at("text").readOnly = false;
    }
  }

  begin() {
    this.running = new AbortController();
    this.say("");
    at("edit-stop").hidden = false;
    at("undo").disabled = true;
    at("text").readOnly = true;
    at("result").hidden = false;
    at("diff").textContent = "";
    at("edit-figures").textContent = "";
  }

  stop() {
    this.running?.abort();
  }

  undo() {
    at("text").value = this.versions.pop();
    at("undo").disabled = !this.versions.length;
    at("result").hidden = true;
  }

  /** Take a file's text as the document. */
  async open(file) {
    if (this.running) return;
    try {
      at("text").value = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      this.versions = [];
      at("undo").disabled = true;
      at("result").hidden = true;
      this.say("");
    } catch {
      this.say(`${file.name} is no text in UTF-8`);
    }
  }
}

/** The new text with what was added and removed, and in it what was copied. */
function showDifference(before, after, explanation) {
  const isCopied = piecesOf(after, explanation).flatMap(({ text, span }) => letters(text).map(() => span !== null));
  let place = 0;
  const shown = difference(before, after).map(({ kind, text }) => {
    if (kind === "removed") return element("del", text);
    const whole = element(kind === "added" ? "ins" : "span");
    let run = "", copied = isCopied[place];
    const put = () => run && whole.append(copied ? element("mark", run) : run);
    for (const letter of letters(text)) {
      if (isCopied[place] !== copied) {
        put();
        run = "";
        copied = isCopied[place];
      }
      run += letter;
      place++;
    }
    put();
    return whole;
  });
  at("diff").replaceChildren(...shown);
}
