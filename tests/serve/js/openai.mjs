// The openai npm package, as its users call it. Arguments: the server's URL. Prints what it saw as JSON.

import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const seen = {};

const models = await client.models.list();
const model = models.data[0].id;

const completion = await client.completions.create({ model, prompt: "the sea", max_tokens: 8, temperature: 0 });
seen.completion = completion.choices[0].text;
seen.usage = completion.usage.total_tokens;

const messages = [{ role: "user", content: "hi" }];
const chat = { model, messages, max_tokens: 8, temperature: 0 };
seen.chat = (await client.chat.completions.create({ ...chat, logprobs: true, top_logprobs: 1 })).choices[0];

let text = "";
const stream = await client.chat.completions.create({ ...chat, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) seen.streamed_usage = chunk.usage.completion_tokens;
}
seen.streamed = text;

const helped = client.chat.completions.stream(chat); // the helper that gathers chunks into a message
seen.gathered = (await helped.finalChatCompletion()).choices[0].message.content;

try {
  await client.chat.completions.create({ ...chat, temperature: 9 });
} catch (error) {
  seen.error = { kind: error.constructor.name, status: error.status, message: error.message };
}

const endless = await client.completions.create({
  model, prompt: "a", max_tokens: 4096, stream: true, ignore_eos: true,
});
let count = 0;
for await (const _ of endless) {
  if (++count === 5) break; // aborts the request
}
seen.left_after = count;

console.log(JSON.stringify(seen));
