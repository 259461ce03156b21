/**
 * What the lessons of this folder share: their flags, sparse features as inputs, and the training of a target, which is
 * kept in a file so that the next run finds it.
 */
import * as fs from 'node:fs';
import * as path from 'node:path';
import { parseArgs } from 'node:util';
import * as tf from '@tensorflow/tfjs';
import {
  adam,
  cosine,
  DEFAULTS,
  inputBatch,
  makeVariable,
  numbers,
  type Rows,
  range,
  refuse,
  say,
  startEngine,
  type T,
  tidyAsync,
  uniformArray,
  writeAtomic,
} from '../nano-param-decomp.ts';

/** What a lesson takes: its own flags and those of all. Numbers stay numbers. */
export type Options = { size: string; seed: number; steps: number; threads: number; out: string; page: boolean };
/** @throws UsageError on an unknown flag or a value that is not accepted */
export function optionsOf(argv: string[], flag: string, sizes: readonly string[], steps: number): Options {
  const string = { type: 'string' } as const;
  const options = {
    [flag]: string,
    seed: string,
    steps: string,
    threads: string,
    out: string,
    page: { type: 'boolean' },
  };
  let values: Record<string, unknown>;
  try {
    values = parseArgs({ args: argv, options: options as never }).values;
  } catch (error) {
    return refuse((error as Error).message.split('\n')[0]!);
  }
  const count = (name: string, usual: number, least = 0) => {
    const n = Number(values[name] ?? usual);
    return Number.isInteger(n) && n >= least ? n : refuse(`--${name}: got ${values[name]}, takes a whole number`);
  };
  const size = `${values[flag] ?? sizes[0]}`;
  if (!sizes.includes(size)) refuse(`--${flag}: got ${size}, takes ${sizes.join(' | ')}`);
  const out = (values.out as string) ?? '';
  const page = Boolean(values.page);
  if (page && !out) refuse('--page: takes --out DIR, the run folder that the page is written into');
  return { size, seed: count('seed', 0), steps: count('steps', steps, 1), threads: count('threads', 0), out, page };
}

/** Rows without an end, S = 1: a feature is there with probability p, and then uniform between `low` and 1. */
export const sparseFeatures = (n: number, p: number, low: number, seed: number, first = 0): Rows => ({
  count: Infinity,
  seqLen: 1,
  row(i) {
    const draws = uniformArray(2 * n, seed, first + i, 1000);
    return Float32Array.from({ length: n }, (_, f) => (draws[f]! < p ? low + (1 - low) * draws[n + f]! : 0));
  },
});

export const normal = (n: number, deviation: number, seed: number, purpose: number): Float32Array => {
  const draws = uniformArray(2 * n, seed, 0, purpose);
  const radius = (u: number) => deviation * Math.sqrt(-2 * Math.log(1 - u)); // Box-Muller
  return Float32Array.from({ length: n }, (_, i) => radius(draws[i]!) * Math.cos(2 * Math.PI * draws[n + i]!));
};

export type Training = { rows: Rows; batch: number; steps: number; lr: number; finalFrac?: number };
const BETAS = { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
const DECAY = 0.01;
/**
 * Trains weights with AdamW on the loss of a batch of inputs, in one stage after another; with `file`, once: from then on
 * they are read from there. The steps of a stage follow a cosine from `lr` to `finalFrac` of it.
 */
export async function trainTarget(
  weights: ReadonlyMap<string, tf.Variable>,
  loss: (inputs: T) => T,
  stages: Training[],
  { threads, file }: { threads: number; file: string },
): Promise<void> {
  const engine = await startEngine({ ...DEFAULTS, threads, xla: 'off' });
  if (file && fs.existsSync(file)) {
    const stored: Record<string, number[]> = JSON.parse(fs.readFileSync(file, 'utf8'));
    for (const [name, w] of weights) tf.tidy(() => w.assign(tf.tensor(stored[name]!, w.shape)));
    return;
  }
  const variables = [...weights.values()];
  const zeros = (w: tf.Variable) => makeVariable(new Float32Array(w.size), w.shape);
  const moments = variables.map(w => ({ m: zeros(w), v: zeros(w) }));
  const update = (f: Record<'inputs' | 'lr' | 'c1' | 'c2', T>) => {
    const { value, grads } = tf.valueAndGrads(() => loss(f.inputs))(variables);
    for (const [i, w] of variables.entries()) {
      const { m, v } = moments[i]!;
      const next = adam(grads[i]!, m, v, BETAS, f.c1, f.c2);
      m.assign(next.m);
      v.assign(next.v);
      w.assign(w.sub(f.lr.mul(next.direction.add(w.mul(DECAY)))));
    }
    return { loss: value };
  };
  let t = 0; // of Adam, all stages together
  for (const { rows, batch, steps, lr, finalFrac = 0.01 } of stages) {
    const step = engine.compile(`target ${rows.seqLen}`, update);
    for (const i of range(0, steps)) {
      t++;
      await tidyAsync(async () => {
        const feeds = { lr: lr * cosine(i, steps, finalFrac), c1: 1 - BETAS.beta1 ** t, c2: 1 - BETAS.beta2 ** t };
        const { loss } = await step({
          inputs: inputBatch(rows, range(t * batch, (t + 1) * batch)),
          ...{ lr: tf.scalar(feeds.lr), c1: tf.scalar(feeds.c1), c2: tf.scalar(feeds.c2) },
        });
        if (i % 200 === 199 || i === steps - 1) {
          const [value = 0] = await numbers(loss!);
          say(`target, step ${i + 1} of ${steps}: loss ${value.toPrecision(3)}`);
        }
      });
    }
  }
  tf.dispose(moments);
  if (!file) return;
  fs.mkdirSync(path.dirname(file), { recursive: true });
  const read = async ([name, w]: [string, tf.Variable]) => [name, Array.from(await numbers(w))];
  writeAtomic(file, JSON.stringify(Object.fromEntries(await Promise.all([...weights].map(read)))));
}
