// One answer on its way: asked for, taken in as it streams, measured.

import { ServerError } from "./api.js";
import { count, rate, seconds, tokens } from "./words.js";

/**
 * Ask for the next answer of a conversation and write it into `message` as it comes.
 *
 * `message.stats`: seconds until the first text, seconds and tokens of the whole, and of the prompt what was read and
 * what was known already. `message.end`: "stop", "length", "stopped" (by the reader) or "error" (then `message.error`).
 * Calls `onText(text)` for each piece. Never rejects.
 */
export async function answer(api, body, message, signal, onText) {
  const asked = performance.now();
  const stats = { pieces: 0 };
  let first = 0;
  let last = 0;
  message.stats = stats;
  try {
    for await (const chunk of api.chat(body, signal)) {
      const choice = chunk.choices[0];
      if (choice?.delta?.content) {
        last = performance.now();
        first ||= last;
        stats.pieces += 1;
        message.content += choice.delta.content;
        onText(choice.delta.content);
      }
      if (choice?.finish_reason) message.end = choice.finish_reason;
      if (chunk.usage) {
        stats.made = chunk.usage.completion_tokens;
        stats.prompt = chunk.usage.prompt_tokens;
        stats.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") {
      message.end = "stopped";
    } else if (error instanceof ServerError) {
      message.end = "error";
      message.error = error.message;
      message.status = error.status;
      message.retryAt = Date.now() + 1000 * error.retrySeconds;
    } else {
      message.end = "error";
      message.error = "Something on this page went wrong. Load it again.";
      console.error(error);
    }
  }
  stats.first = first ? (first - asked) / 1000 : null;
  stats.writing = (last - first) / 1000;
}

/** Tokens a second while it was written, or null where too few came. A piece is one token or more. */
function speed(stats) {
  const made = stats.made ?? stats.pieces;
  return made > 1 && stats.writing > 0 ? (made - 1) / stats.writing : null;
}

/** The figures of an answer in a line: "84 tokens, 32.1 tokens/s ...". */
export function figures(message) {
  const { stats, end } = message;
  if (!stats) return [];
  const parts = [];
  if (stats.made !== undefined) parts.push(tokens(stats.made));
  else if (stats.pieces) parts.push(`at least ${tokens(stats.pieces)}`);
  const perSecond = speed(stats);
  if (perSecond !== null) parts.push(`${rate(perSecond)} tokens/s`);
  if (stats.first) parts.push(`first after ${seconds(stats.first)}`);
  if (stats.prompt !== undefined) {
    const read = stats.prompt - stats.cached;
    parts.push(stats.cached ? `${count(read)} read, ${count(stats.cached)} known` : `${count(read)} read`);
  }
  if (end === "length") parts.push("cut at the limit");
  if (end === "stopped") parts.push("stopped");
  return parts;
}
