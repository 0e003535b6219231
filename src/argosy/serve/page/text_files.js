// Text files of a message: read as UTF-8 within a bound, and quoted before the words of the message.

import { volume } from "./units.js";

export const MOST_TEXT_BYTES = 512 * 2 ** 10;
export const LONGEST_NAME = 255;

// What a file dialog offers. Any other file that is text can be dropped on the page.
export const TEXT_ENDINGS = "txt md csv tsv json jsonl yaml yml toml ini log xml html css js ts jsx tsx py rb go rs c h cpp hpp cs "
  + "java kt swift php sh sql r lua tex diff patch svg";
export const TEXT_ACCEPT = ["text/*", ...TEXT_ENDINGS.split(" ").map((ending) => `.${ending}`)].join(",");

/** The text of a file. The error says what is wrong with it. */
export async function readText(file) {
  if (file.type === "application/pdf" || /\.pdf$/i.test(file.name)) {
    throw new Error("PDF files are not read. Paste their text, or attach pictures of the pages.");
  }
  if (file.size > MOST_TEXT_BYTES) {
    throw new Error(`A text file may have at most ${volume(MOST_TEXT_BYTES)}, and this one has ${volume(file.size)}.`);
  }
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error("This file is not text in UTF-8.");
  }
  if (text.includes("\0")) throw new Error("This file is not text: it has zero bytes.");
  return text.replace(/\r\n?/g, "\n");
}

/** A file as a fenced block under its name. The fence is longer than every run of backticks in the file. */
export function quoted({ name, text }) {
  const longest = (text.match(/`+/g) ?? []).reduce((most, run) => Math.max(most, run.length), 2);
  const fence = "`".repeat(longest + 1);
  const ending = /\.([A-Za-z0-9]{1,12})$/.exec(name)?.[1].toLowerCase() ?? "";
  return `File ${name.replace(/[\r\n`]/g, "_")}:\n\n${fence}${ending}\n${text.replace(/\n$/, "")}\n${fence}`;
}
