/* What changed between two texts, word by word. */

const words = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];

/**
 * @returns {{kind: "same" | "added" | "removed", text: string}[]} In order: a shortest way from `before` to `after`.
 */
export function difference(before, after) {
  const a = words(before), b = words(after);
  let first = 0, last = 0;
  while (first < a.length && first < b.length && a[first] === b[first]) first++;
  while (last < a.length - first && last < b.length - first && a[a.length - 1 - last] === b[b.length - 1 - last]) last++;
  const path = shortest(a.slice(first, a.length - last), b.slice(first, b.length - last));
  const whole = [
    ...a.slice(0, first).map((text) => ({ kind: "same", text })), ...path,
    ...a.slice(a.length - last).map((text) => ({ kind: "same", text })),
  ];
  const joined = [];
  for (const { kind, text } of whole) {
    if (joined.length && joined.at(-1).kind === kind) joined.at(-1).text += text;
    else joined.push({ kind, text });
  }
  return joined;
}

const MOST_STEPS = 1000;

/* Myers' greedy algorithm; texts with less in common are shown as replaced. */
function shortest(a, b) {
  const reached = new Map([[1, 0]]), history = [];
  for (let steps = 0; steps <= Math.min(a.length + b.length, MOST_STEPS); steps++) {
    history.push(new Map(reached));
    for (let k = -steps; k <= steps; k += 2) {
      const down = k === -steps || (k !== steps && (reached.get(k - 1) ?? -1) < (reached.get(k + 1) ?? -1));
      let x = down ? reached.get(k + 1) ?? 0 : (reached.get(k - 1) ?? 0) + 1;
      let y = x - k;
      while (x < a.length && y < b.length && a[x] === b[y]) { x++; y++; }
      reached.set(k, x);
      if (x >= a.length && y >= b.length) return walkBack(a, b, history);
    }
  }
  return [...a.map((text) => ({ kind: "removed", text })), ...b.map((text) => ({ kind: "added", text }))];
}

function walkBack(a, b, history) {
  const found = [];
  let x = a.length, y = b.length;
  for (let steps = history.length - 1; steps >= 0; steps--) {
    const reached = history[steps], k = x - y;
    const down = k === -steps || (k !== steps && (reached.get(k - 1) ?? -1) < (reached.get(k + 1) ?? -1));
    const before = down ? k + 1 : k - 1;
    const fromX = steps === 0 ? 0 : reached.get(before) ?? 0, fromY = steps === 0 ? 0 : fromX - before;
    while (x > fromX && y > fromY) { found.push({ kind: "same", text: a[--x] }); y--; }
    if (steps === 0) break;
    if (down) found.push({ kind: "added", text: b[--y] });
    else found.push({ kind: "removed", text: a[--x] });
  }
  return found.reverse();
}
