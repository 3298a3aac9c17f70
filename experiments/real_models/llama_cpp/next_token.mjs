// Probabilities of the next token by llama.cpp: node next_token.mjs FILE.gguf PROMPTS.json ANSWERS.json (token ids in, 2,000 likeliest out).
import fs from "fs";
import {getLlama} from "node-llama-cpp";

const [file, asked, answered] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 512, sequences: 1, threads: 1});
const sequence = context.getSequence();
const everything = {temperature: 1, topK: 0, topP: 1, minP: 0};
const answers = [];
for (const ids of JSON.parse(fs.readFileSync(asked, "utf8"))) {
    await sequence.clearHistory();
    const last = [ids[ids.length - 1], {generateNext: {probabilities: true, options: everything}}];
    const out = await sequence.controlledEvaluate([...ids.slice(0, -1), last]);
    answers.push([...out[ids.length - 1].next.probabilities.entries()].slice(0, 2000));
}
fs.writeFileSync(answered, JSON.stringify(answers));
