/**
 * What the lessons of this folder share: their flags, sparse features as inputs, and the training of a target, which is
 * kept in a file so that the next run finds it.
 */
import * as fs from 'node:fs';
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
// biome-ignore format: kept on few lines
import {
  adam, type CiFunction, type Config, cosine, type Data, DEFAULTS, decompose, evaluationKey, importances, inputBatch,
  interpolate, type Masks, type Metrics, makeVariable, newRun, numbers, type Problem, pgdStart, pgdStep, type Rows,
  type Run, range, say, startEngine, sum, type T, type Target, tidyAsync, totalC, uniformArray, writeAtomic,
} from '../nano-param-decomp.ts';
import { finish } from '../postprocess/index.ts';

/** What every lesson takes: which target, and the numbers of the run. */
export interface Options {
  lesson: string;
  which: string;
  seed: number;
  steps: number;
  threads: number; // of the engine; 0 = all cores
  share: number; // of the target's training: less than 1 where `steps` is shorter than the lesson's own
  out: string; // the run folder, with the trained target and the page
}
/**
 * The flags of a lesson; `flag` chooses among targets, the first one by default, and `steps` are the default of each. A
 * wrong one ends the program: one line, exit code 2.
 */
export function optionsOf(lesson: string, flag: string, steps: Readonly<Record<string, number>>): Options {
  const wrong = (message: string): never => {
    say(`${lesson}: ${message}`);
    process.exit(2);
  };
  const names = [flag, 'seed', 'steps', 'threads', 'out'];
  const values: Record<string, string> = {};
  for (const arg of process.argv
    .slice(2)
    .join('=')
    .replaceAll(/=(?=--)/g, ' ')
    .split(' ')
    .filter(Boolean)) {
    const [, name = '', value = ''] = /^--([a-z]+)=(.+)$/.exec(arg) ?? [];
    if (!names.includes(name)) wrong(`got ${arg}, takes ${names.map(n => `--${n} VALUE`).join(' ')}`);
    values[name] = value;
  }
  const which = values[flag] ?? Object.keys(steps)[0]!;
  if (!Object.hasOwn(steps, which)) wrong(`--${flag}: got ${which}, takes ${Object.keys(steps).join(' | ')}`);
  const count = (name: string, usual: number, least: number): number => {
    const n = Number(values[name] ?? usual);
    return Number.isInteger(n) && n >= least ? n : wrong(`--${name}: got ${values[name]}, takes a whole number`);
  };
  const seed = count('seed', 0, 0);
  const usual = steps[which]!;
  const asked = count('steps', usual, 1);
  const out = values.out ?? path.join('runs', `${lesson}-${which}-seed${seed}`);
  return { lesson, which, seed, steps: asked, threads: count('threads', 0, 0), share: Math.min(1, asked / usual), out };
}

/**
 * What training minimises, measured on held-out rows by a fresh adversary, and the error of what leaves the layers before
 * the last: where a ReLU hides it from the output, two features on one component cost the losses nothing. It does not
 * know the true answer.
 */
function objective({ target, config }: Problem, metrics: Metrics): number {
  const hidden = (path: string) => metrics[`eval/loss/StochasticHiddenActsReconLoss/${path}`] ?? 0;
  return (
    config.coeffFaith * metrics['eval/loss/FaithfulnessLoss']! +
    config.coeffImp * metrics['eval/loss/ImportanceMinimalityLoss']! +
    config.coeffStoch * metrics['eval/loss/StochasticReconSubsetLoss']! +
    config.coeffPpgd * metrics['eval/loss/PGDReconLoss']! +
    sum(target.linears.slice(0, -1).map(({ path }) => hidden(path)))
  );
}

/**
 * Decomposes and evaluates a target in the lesson's folder, and writes the page there. With several `starts` it does so
 * from as many initial values and keeps the one whose objective ends lowest: a component that two features share is a
 * local minimum, which no later step leaves.
 */
export async function decomposeTarget(
  target: Target,
  data: Data,
  { lesson, which, seed, steps, threads, out }: Options,
  changes: Partial<Config>,
  ci?: CiFunction,
  starts = 1,
): Promise<{ run: Run; metrics: Metrics }> {
  const same = { threads, nSteps: steps, evalFreq: 0, saveEvery: 0, xla: 'off', evalBatchSize: 1024 };
  const source = { path: `${lesson} ${which}`, type: 'own network', sha256: '' };
  let best: { run: Run; metrics: Metrics; folder: string; value: number } | undefined;
  for (const start of range(0, starts)) {
    const folder = path.join(out, `start-${start}`);
    fs.rmSync(folder, { recursive: true, force: true }); // of an earlier run of the lesson
    const given = { ...same, ...changes, out: folder, seed: seed + 1000 * start };
    const run = await newRun({ ...target, source }, data, given, ci);
    const metrics = (await decompose(run))!;
    const value = objective(run.problem, metrics);
    say(`start ${start}: objective ${value.toExponential(3)}, L0 ${metrics['eval/l0/0.0_total']!.toFixed(3)}`);
    if (!best || value < best.value) best = { run, metrics, folder, value };
  }
  const { run, metrics, folder } = best!;
  for (const file of fs.readdirSync(folder)) fs.renameSync(path.join(folder, file), path.join(out, file));
  for (const start of range(0, starts)) fs.rmSync(path.join(out, `start-${start}`), { recursive: true });
  run.problem.config.out = out;
  await finish(run, metrics);
  return { run, metrics };
}

/** The masks of a fresh adversary, which is one source for all positions and moves 20 times. */
export function adversaryMasks({ problem, params }: Run, inputs: T): Masks {
  const seen = tf.tidy(() => importances(problem, params, inputs)); // the same for all moves
  let source = pgdStart(problem, evaluationKey(problem.config, 0));
  for (const _ of range(0, 20)) source = tf.tidy(() => pgdStep(problem, params, inputs, source, seen).next);
  const [s, delta] = tf.split(source, [totalC(problem.modules), -1], 1) as [T, T];
  return { mask: interpolate(seen.g, s), delta };
}
/** All of n components but the deleted ones. */
export const allBut = (n: number, deleted: ReadonlySet<number>): Masks => ({
  mask: tf.tensor2d(
    range(0, n).map(c => Number(!deleted.has(c))),
    [1, n],
  ),
});
/** The mean of the given rows of [N,ΣC], as numbers. */
export const meanRow = (x: T<'N ΣC'>, rows: number[]): Promise<Float32Array> =>
  numbers(tf.tidy(() => tf.gather(x, tf.tensor1d(rows, 'int32')).mean(0)));
/** Shares of 1 as one character each. */
export const inTenths = (shares: ArrayLike<number>) =>
  Array.from(shares, x => (x < 0.05 ? '·' : `${Math.min(9, Math.round(10 * x))}`)).join('');

/** Prints the marks: a table for people, and as the last line the same as one JSON object. */
export function printMarks(marks: Readonly<Record<string, string | number>>): void {
  const shown = (x: string | number) => (typeof x === 'number' && !Number.isInteger(x) ? x.toPrecision(4) : `${x}`);
  console.log(['', ...Object.entries(marks).map(([name, x]) => `  ${name.padEnd(28)}${shown(x)}`)].join('\n'));
  console.log(JSON.stringify(marks));
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
 * Trains weights with AdamW on the loss of a batch of inputs, in one stage after another once: from then on they
 * are read from the lesson's folder. The steps of a stage follow a cosine from `lr` to `finalFrac` of it.
 */
export async function trainTarget(
  weights: ReadonlyMap<string, tf.Variable>,
  loss: (inputs: T) => T,
  stages: Training[],
  { threads, share, out }: Options,
): Promise<void> {
  const file = path.join(out, share < 1 ? `target-${share}.json` : 'target.json');
  const engine = await startEngine({ ...DEFAULTS, threads, xla: 'off' });
  if (fs.existsSync(file)) {
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
  for (const { rows, batch, lr, finalFrac = 0.01, ...stage } of stages) {
    const steps = Math.ceil(stage.steps * share);
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
  fs.mkdirSync(path.dirname(file), { recursive: true });
  const read = async ([name, w]: [string, tf.Variable]) => [name, Array.from(await numbers(w))];
  writeAtomic(file, JSON.stringify(Object.fromEntries(await Promise.all([...weights].map(read)))));
}
