// Room in a full context: which of the oldest turns the model no longer reads, and the summary that it reads instead.
//
// A turn begins with a question, and the last one always stays. `argosy chat` makes room in the same way.

import { isNumber } from "./units.js";

const CHARACTERS_PER_TOKEN = 3;
const SUMMARY_SHARE = 8;  // a summary takes at most an eighth of the context
const WORDS_PER_TOKEN = 0.6;  // fewer than a token has in most languages: the summary must not be cut off
const USUAL_TOKENS = 8192;  // of a context whose size is not told

/** What of a path the model reads: how many messages at its start are dropped, and the summary in their place, or "". */
export function roomOf(path) {
  const { dropped = 0, summary = "" } = path.findLast((message) => message.dropped > 0) ?? {};
  return { dropped, summary };
}

/** Where what the model reads could begin so that it has fewer turns: the places of later questions. */
export function cutsOf(path) {
  const { dropped } = roomOf(path);
  return path.flatMap(({ role }, place) => (role === "user" && place > dropped && path[place - 1].role === "assistant" ? [place] : []));
}

/** Where to cut so that the rest takes at most half of a context of `limit` tokens; the last place if none is enough. */
export function cutFor(path, limit) {
  const cuts = cutsOf(path);
  if (!isNumber(limit)) return cuts[Math.floor(cuts.length / 2)];
  const sizes = sizesOf(path);
  const fits = (cut) => sizes.slice(cut).reduce((sum, size) => sum + size, 0) <= limit / 2;
  return cuts.find(fits) ?? cuts.at(-1);
}

/** About how many tokens each message takes; a whole turn is counted at its answer. */
function sizesOf(path) {
  let before = 0;  // tokens of the conversation up to the last answer
  let waiting = 0;  // characters since then
  return path.map(({ role, text, attachments, tokens, dropped }) => {
    const files = attachments.filter(({ kind }) => kind === "text");
    waiting += files.reduce((sum, { size }) => sum + size, text.length);
    if (role === "user") return 0;
    const own = isNumber(tokens) && tokens > before && !dropped ? tokens - before : Math.ceil(waiting / CHARACTERS_PER_TOKEN);
    if (isNumber(tokens)) before = tokens;
    waiting = 0;
    return own;
  });
}

export const summaryTokens = (limit) => Math.floor((limit ?? USUAL_TOKENS) / SUMMARY_SHARE);

/** What the model is asked before its oldest turns are dropped, in the words of `argosy chat`. */
export const summaryQuestion = (limit) => (
  `Summarise our conversation so far in at most ${Math.floor(summaryTokens(limit) * WORDS_PER_TOKEN)} words, `
  + "so that we can go on without it: facts, names, numbers, decisions and open questions.");
