/* Texts with what was copied marked. Places count characters as Python does, not UTF-16 units. */

export const letters = (text) => Array.from(text);

/** An element with a text in it and nothing else. */
export function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** A text that is still being written: which pieces were copied, but not yet from where. */
export function writePieces(into, segments) {
  for (const segment of segments) {
    const last = into.lastChild;
    const name = segment.copied ? "MARK" : "SPAN";
    if (last && last.nodeName === name) last.append(segment.text);
    else into.append(element(name.toLowerCase(), segment.text));
  }
}

/**
 * The pieces of a whole answer.
 *
 * @param {string} content What of the answer is shown.
 * @param {{text: string, spans: object[]} | undefined} explanation Of all that was written.
 * @returns {{text: string, span: object | null}[]} In order; together `content`.
 */
export function piecesOf(content, explanation) {
  const at = explanation ? explanation.text.lastIndexOf(content) : -1;
  if (at < 0) return [{ text: content, span: null }];
  const first = letters(explanation.text.slice(0, at)).length;
  const shown = letters(content), pieces = [];
  let end = 0;
  for (const span of explanation.spans) {
    const start = Math.max(span.start - first, end), stop = Math.min(span.stop - first, shown.length);
    if (stop <= start) continue;
    if (start > end) pieces.push({ text: shown.slice(end, start).join(""), span: null });
    const cut = start - (span.start - first);
    const offset = span.offset == null ? undefined : span.offset + cut;
    pieces.push({ text: shown.slice(start, stop).join(""), span: { ...span, offset, length: stop - start } });
    end = stop;
  }
  if (end < shown.length) pieces.push({ text: shown.slice(end).join(""), span: null });
  return pieces;
}

/** Put pieces into an element; one that was copied calls `show` when it is asked for. */
export function putPieces(into, pieces, show) {
  into.replaceChildren(...pieces.map(({ text, span }) => {
    if (!span) return element("span", text);
    const mark = element("mark", text);
    if (!text.trim()) return mark; // nothing to be seen, and no name for those who listen
    mark.tabIndex = 0;
    mark.setAttribute("role", "button");
    mark.addEventListener("click", () => show(span, text, mark));
    mark.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      show(span, text, mark);
    });
    return mark;
  }));
}

const PLACES = {
  prompt: "what the model was shown", answer: "this answer, further up", prediction: "the document",
  earlier_prompt: "an earlier message, not in this call", earlier_answer: "an earlier answer, not in this call",
  earlier_prediction: "an earlier document", pool: "a shared pool", grammar: "the form that was asked for",
  frequent: "nowhere: a frequent word",
};

let asked = null;

/** Show where a span was copied from. @param {string[]} messages The texts that the call showed. */
export function showSource(span, text, messages, mark) {
  const message = span.message == null ? undefined : messages[span.message];
  const place = message === undefined ? PLACES[span.source] ?? span.source : `message ${span.message + 1} of ${messages.length}`;
  const shown = document.getElementById("source-text");
  document.getElementById("source-place").textContent =
    span.offset === undefined ? place : `${place}, from character ${span.offset + 1}`;
  if (message !== undefined && span.offset !== undefined) {
    const all = letters(message), stop = span.offset + span.length;
    shown.replaceChildren(
      all.slice(Math.max(span.offset - 60, 0), span.offset).join(""),
      element("mark", all.slice(span.offset, stop).join(""), "found"),
      all.slice(stop, stop + 60).join(""),
    );
  } else {
    shown.replaceChildren(span.before ?? "", element("mark", text, "found"), span.after ?? "");
  }
  document.getElementById("source").hidden = false;
  asked = mark;
  document.getElementById("source-close").focus();
}

export function hideSource() {
  document.getElementById("source").hidden = true;
  asked?.focus();
  asked = null;
}

/** The figures of an answer in one line. */
export function figuresOf(stats, usage, seconds) {
  const tokens = usage?.completion_tokens;
  if (!stats || tokens === undefined) return "";
  return [
    `${tokens} tokens in ${seconds.toFixed(2)} s`,
    `${(tokens / Math.max(stats.total_s, 1e-3)).toFixed(0)} tokens/s`,
    `${stats.tokens_per_forward.toFixed(1)} tokens per pass`,
    `${Math.round(100 * stats.copied_share)}% copied`,
    `${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} prompt tokens reused`,
  ].join(" · ");
}
