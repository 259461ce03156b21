/**
 * What the target says with components removed or scaled.
 *
 *   npx tsx nano-param-decomp.ts ask --run DIR --prompt TEXT [--without m:i,…] [--scale m:i=2,…]
 *     [--only-where-active] [--tokens N] [--temperature T] [--json]
 *   npx tsx nano-param-decomp.ts ask --run DIR --find-token T | --find-label REGEX | --find-text TEXT
 *
 * The forward is the target's with masks of ones and the delta component on, so that nothing changes without an edit.
 * The mean KL between the edited and the unedited model, on the prompt and on held-out text, is always printed: an edit
 * that breaks everything must be seen to.
 */
import * as fs from 'node:fs';
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import {
  importances,
  inputBatch,
  type Module,
  maskedForward,
  ownLinear,
  type T,
  tidyAsync,
  totalC,
  uniformArray,
} from '../nano-param-decomp.ts';
import type { Harvest } from './harvest.ts';
import type { LmRun } from './run.ts';
import { component, encode, type Flags, nameOf, numberFlag, refuse, tokenId, tokenText } from './stages.ts';

/** A component's contribution times a factor; 0: removed. */
export interface Edit {
  column: number;
  factor: number;
}
export interface Question {
  tokens: readonly number[];
  edits: readonly Edit[];
  onlyWhereActive: boolean; // the edits hold only at positions where the component's importance is above 0
  length: number; // tokens of the continuation
  temperature: number; // 0: the likeliest token
  seed: number;
}
export type Prediction = [token: number, probability: number];
/** What `ask --json` prints. */
export interface Answer {
  prompt: string;
  before: Prediction[]; // the ten likeliest next tokens of the unedited model, after the prompt
  after: Prediction[]; // of the edited one
  klPrompt: number; // mean KL(unedited ‖ edited) over the prompt's positions, nats
  klHeldOut: number;
  heldOutPositions: number;
  continuation: string; // by the edited model
  continuationBefore: string; // by the unedited one
  strings: Record<number, string>;
}
const LISTED = 10;
const HELD_OUT_POSITIONS = 8192; // over which the KL is averaged, where there are so many

/** "m:i,m:i" and "m:i=factor,…" as edits. @throws UsageError */
export function parseEdits(modules: readonly Module[], without: string, scale: string): Edit[] {
  const parts = (list: string) => list.split(',').filter(part => part.trim());
  const removed = parts(without).map(spec => ({ column: component(modules, spec).column, factor: 0 }));
  const scaled = parts(scale).map(spec => {
    const [, name = '', number = ''] = /^(.*)=([^=]+)$/.exec(spec) ?? [];
    const factor = number.trim() ? Number(number) : Number.NaN;
    if (!Number.isFinite(factor)) return refuse(`${spec}: takes module:index=factor`);
    return { column: component(modules, name).column, factor };
  });
  const edits = [...removed, ...scaled];
  if (new Set(edits.map(e => e.column)).size < edits.length) return refuse('a component is edited twice');
  return edits;
}

/** Logits [N,vocab] under the edits. */
export function editedLogits({ problem, params }: LmRun, tokens: T<'B S'>, edits: readonly Edit[], active: boolean): T {
  const sumC = totalC(problem.modules);
  const change = new Float32Array(sumC); // factor − 1
  for (const { column, factor } of edits) change[column] = factor - 1;
  let changes: T = tf.tensor2d(change, [1, sumC]);
  if (active && edits.length > 0) {
    const { g } = importances(problem, params, tokens);
    changes = tf.mul(tf.cast(tf.greater(g, 0), 'float32'), changes);
  }
  const delta = tf.ones([1, problem.modules.length]);
  return maskedForward(problem, params, tokens, { mask: tf.add(1, changes), delta });
}

/** KL(p ‖ q) of each position [N], from log probabilities. */
export const klByPosition = (p: T<'N vocab'>, q: T<'N vocab'>): T<'N'> => tf.sum(tf.mul(tf.exp(p), tf.sub(p, q)), 1);

/** Held-out rows in batches, as many as the KL is averaged over. */
export function* heldOutBatches({ data: { heldOut } }: LmRun): Generator<tf.Tensor2D> {
  const count = Math.min(heldOut.count, Math.ceil(HELD_OUT_POSITIONS / heldOut.seqLen));
  const size = Math.max(1, Math.floor(1024 / heldOut.seqLen));
  for (let first = 0; first < count; first += size) {
    const rows = Array.from({ length: Math.min(size, count - first) }, (_, i) => first + i);
    yield inputBatch(heldOut, rows) as tf.Tensor2D;
  }
}

/** @param progress called after every piece of work; what it throws ends the job */
export async function answer(job: LmRun, question: Question, progress?: () => Promise<void>): Promise<Answer> {
  const { problem } = job;
  const { edits, onlyWhereActive, tokens } = question;
  const context = problem.target.arch.context;
  const edited = (input: T) => tf.logSoftmax(editedLogits(job, input, edits, onlyWhereActive));
  const unedited = (input: T) => problem.target.forward(input, ownLinear(problem.target)).logSoftmax();
  const lastRow = (logProbs: T): T => tf.slice(logProbs, [logProbs.shape[0]! - 1, 0], [1, logProbs.shape[1]!]);
  const rowOf = (list: readonly number[]) => tf.tensor2d(Int32Array.from(list), [1, list.length], 'int32');
  const numbers = async (x: T) => (await x.data()) as Float32Array;

  const predictions = (logProbs: Float32Array): Prediction[] => {
    const order = [...logProbs.keys()].sort((a, b) => logProbs[b]! - logProbs[a]!);
    return order.slice(0, LISTED).map(token => [token, Math.exp(logProbs[token]!)]);
  };
  const klOf = (input: T) =>
    tidyAsync(async () => (await numbers(tf.sum(klByPosition(unedited(input), edited(input)))))[0]!);
  const next = (model: (input: T) => T, list: readonly number[]) =>
    tidyAsync(async () => numbers(lastRow(model(rowOf(list)))));

  const [before, after] = [predictions(await next(unedited, tokens)), predictions(await next(edited, tokens))];
  const prompt = rowOf(tokens);
  const klPrompt = (await klOf(prompt)) / tokens.length;
  prompt.dispose();
  let [klHeldOut, heldOutPositions] = [0, 0];
  for (const batch of heldOutBatches(job)) {
    klHeldOut += await klOf(batch);
    heldOutPositions += batch.size;
    batch.dispose();
    await progress?.();
  }
  const continued = async (model: (input: T) => T) => {
    const draws = uniformArray(Math.max(1, question.length), question.seed, 0, 40);
    const list = [...tokens];
    for (let i = 0; i < question.length && list.length < context; i++) {
      list.push(sample(await next(model, list), question.temperature, draws[i]!));
      await progress?.();
    }
    return list.slice(tokens.length);
  };
  const [continuation, continuationBefore] = [await continued(edited), await continued(unedited)];
  const textOf = (list: readonly number[]) => job.data.tokenizer?.decode([...list]) ?? list.join(' ');
  const used = [...before, ...after].map(([token]) => token);
  return {
    prompt: textOf(tokens),
    ...{ before, after, klPrompt, klHeldOut: klHeldOut / heldOutPositions, heldOutPositions },
    ...{ continuation: textOf(continuation), continuationBefore: textOf(continuationBefore) },
    strings: Object.fromEntries(used.map(id => [id, tokenText(job, id)])),
  };
}

/** A token by its log probabilities; temperature 0: the likeliest. */
function sample(logProbs: Float32Array, temperature: number, draw: number): number {
  const likeliest = logProbs.reduce((best, x, i) => (x > logProbs[best]! ? i : best), 0);
  if (temperature === 0) return likeliest;
  const weights = logProbs.map(x => Math.exp((x - logProbs[likeliest]!) / temperature));
  let left = draw * weights.reduce((sum, w) => sum + w, 0);
  for (const [i, w] of weights.entries()) {
    left -= w;
    if (left < 0) return i;
  }
  return likeliest;
}

export const FLAGS = {
  prompt: 'string',
  without: 'string',
  scale: 'string',
  'only-where-active': 'boolean',
  tokens: 'string',
  temperature: 'string',
  json: 'boolean',
  'find-token': 'string',
  'find-label': 'string',
  'find-text': 'string',
} as const;

/** The command. @returns the exit code */
export async function ask(job: LmRun, flags: Flags): Promise<number> {
  const found = await find(job, flags);
  if (found) {
    console.log(flags.json ? JSON.stringify(found) : found.map(f => `${f.component}  ${f.why}`).join('\n'));
    return 0;
  }
  const { prompt } = flags;
  if (typeof prompt !== 'string')
    return refuse('ask: takes --prompt TEXT, or one of --find-token, --find-label, --find-text');
  const result = await answer(job, {
    tokens: encode(job, prompt),
    edits: parseEdits(job.problem.modules, `${flags.without ?? ''}`, `${flags.scale ?? ''}`),
    onlyWhereActive: flags['only-where-active'] === true,
    length: numberFlag(flags, 'tokens', 20, { min: 0, max: 4096, integer: true }),
    temperature: numberFlag(flags, 'temperature', 0, { min: 0, max: 100 }),
    seed: job.problem.config.seed,
  });
  result.prompt = prompt;
  console.log(flags.json ? JSON.stringify(result) : answerTable(result));
  return 0;
}

function answerTable({ strings, ...a }: Answer): string {
  const cell = (p: Prediction | undefined) =>
    p ? `${JSON.stringify(strings[p[0]]).padEnd(18)}${p[1].toFixed(4).padStart(8)}` : '';
  const rows = a.before.map((p, i) => `  ${cell(p)}    ${cell(a.after[i])}`);
  const kl = (x: number) => (x >= 1e-3 ? x.toFixed(4) : x.toExponential(2));
  return [
    `  ${'next, unedited'.padEnd(26)}    next, edited`,
    ...rows,
    `  mean KL between the two: ${kl(a.klPrompt)} nats on the prompt, ${kl(a.klHeldOut)} on ${a.heldOutPositions} held-out positions`,
    `  unedited: ${JSON.stringify(a.continuationBefore)}`,
    `  edited:   ${JSON.stringify(a.continuation)}`,
  ].join('\n');
}

/** A component that was searched for, and what speaks for it. */
export interface Found {
  component: string; // module:index
  why: string;
}
const FOUND = 20;

/** By token (PMI with input or output), by label (regular expression), by text (what fires on it); else undefined. */
export async function find(job: LmRun, flags: Flags): Promise<Found[] | undefined> {
  const { out } = job.problem.config;
  const [token, label, text] = ['find-token', 'find-label', 'find-text'].map(name => flags[name]);
  if (typeof token === 'string') {
    const file = path.join(out, 'harvest.json');
    if (!fs.existsSync(file)) return refuse(`${out}: no harvest.json; harvest --run ${out} makes it`);
    const { components }: Harvest = JSON.parse(fs.readFileSync(file, 'utf8'));
    const id = tokenId(job, token);
    const hits = components.flatMap(c =>
      (['input', 'output'] as const).flatMap(side => {
        const stat = c[side].top.find(([t]) => t === id);
        return stat?.[2] ? [{ component: `${c.module}:${c.index}`, pmi: stat[2], why: `${side} PMI ${stat[2]}` }] : [];
      }),
    );
    return hits
      .sort((a, b) => b.pmi - a.pmi)
      .slice(0, FOUND)
      .map(({ component, why }) => ({ component, why }));
  }
  if (typeof label === 'string') {
    const file = path.join(out, 'interpretations.jsonl');
    if (!fs.existsSync(file)) return refuse(`${out}: no interpretations.jsonl; interpret --run ${out} makes it`);
    let wanted: RegExp;
    try {
      wanted = new RegExp(label, 'iu');
    } catch (error) {
      return refuse(`--find-label: ${(error as Error).message}`);
    }
    const lines = fs
      .readFileSync(file, 'utf8')
      .split('\n')
      .filter(line => line.trim());
    const labels = lines.map(line => JSON.parse(line)).filter(x => x.kind === 'label');
    const textOf = (result: unknown) =>
      typeof result === 'string' ? result : `${(result as { label?: unknown })?.label ?? ''}`;
    const hits = labels.filter(({ result }) => wanted.test(textOf(result)));
    return hits.slice(0, FOUND).map(x => ({ component: `${x.module}:${x.index}`, why: textOf(x.result) }));
  }
  if (typeof text !== 'string') return undefined;
  const tokens = encode(job, text);
  const { modules } = job.problem;
  const input = tf.tensor2d(Int32Array.from(tokens), [1, tokens.length], 'int32');
  const g = tf.tidy(() => tf.max(importances(job.problem, job.params, input).g, 0));
  const values = (await g.data()) as Float32Array;
  tf.dispose([input, g]);
  const firing = [...values.keys()].filter(c => values[c]! > 0).sort((a, b) => values[b]! - values[a]!);
  return firing.map(c => {
    const { module, index } = nameOf(modules, c);
    return { component: `${module}:${index}`, why: `importance ${values[c]!.toFixed(3)}` };
  });
}
