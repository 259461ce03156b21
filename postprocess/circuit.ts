/**
 * The circuit of one prediction: importances found for one text alone, and what four interventions say about them.
 *
 *   npx tsx nano-param-decomp.ts circuit --run DIR --text T [--position t] [--token X] [--steps N] [--coefficient c]
 *
 * Free importance logits for the pairs (position, component) that are alive, started at the CI function's, all others
 * off. Adam, learning rate 0.1 with a cosine to 0, on
 *     0.5 recon(stochastic masks) + 0.5 recon(adversary: 4 sign steps of 1.0 over alive pairs) + c · importance (p 0.3)
 * where recon is the cross-entropy of the token (or, without one, the KL to the target) at the position. The circuit is
 * what keeps an importance above 0. The interventions show all four regimes, never the best alone, and the same for
 * as many random alive pairs: the control.
 */
import * as crypto from 'node:crypto';
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import {
  adam,
  cosine,
  importances,
  interpolate,
  lowerLeaky,
  type Masks,
  maskedForward,
  randomKey,
  type T,
  tidyAsync,
  totalC,
  uniform,
  uniformArray,
  upperLeaky,
} from '../nano-param-decomp.ts';
import { type Circuit, type CircuitNode, type CircuitSettings, circuitDefaults, type Regime } from './formats.ts';
import { refreshPage } from './parts.ts';
import type { LmRun } from './run.ts';
import {
  componentsHash,
  encode,
  type Flags,
  nameOf,
  numberFlag,
  refuse,
  talk,
  tokenId,
  tokenText,
  writeAtomic,
} from './stages.ts';

const PURPOSE = { u: 50, delta: 51, adversary: 52 };

/** The optimised importances [S,ΣC] and which pairs were alive. */
export async function optimise(
  job: LmRun,
  tokens: readonly number[],
  position: number,
  token: number | undefined,
  settings: CircuitSettings,
  progress?: (step: number) => Promise<void>,
) {
  const { problem, params, engine } = job;
  const { modules, config } = problem;
  const [S, sumC, M] = [tokens.length, totalC(modules), modules.length];
  const row = tf.tidy(() => tf.tensor2d(Int32Array.from(tokens), [1, S], 'int32'));
  const start = tf.tidy(() => {
    const { z, g, pass } = importances(problem, params, row);
    const last = tf.slice(pass.output.logSoftmax(), [position, 0], [1, -1]);
    return { z, alive: tf.cast(tf.greater(g, 0), 'float32'), last, one: tf.variable(z, false) };
  });
  const logits = start.one;
  const zeros = () => tf.tidy(() => tf.variable(tf.zerosLike(start.z), false));
  const [m, v] = [zeros(), zeros()];
  const alive = tf.tidy(() => tf.variable(start.alive, false));
  const logTarget = tf.tidy(() => tf.variable(start.last, false)); // variables: state of a traced graph
  const wanted = token === undefined ? undefined : token;
  /** At the position, of the model under these masks. */
  const recon = (rows: T, masks: Masks): T => {
    const predicted = tf.logSoftmax(tf.slice(maskedForward(problem, params, rows, masks), [position, 0], [1, -1]));
    if (wanted !== undefined) return tf.neg(tf.sum(tf.slice(predicted, [0, wanted], [1, 1])));
    return tf.sum(tf.mul(tf.exp(logTarget), tf.sub(logTarget, predicted)));
  };
  const step = engine.compile('circuit', ({ tokens: rows, key, lr, c1, c2 }: Record<string, T>) => {
    const draw = (shape: number[], purpose: number) => uniform(shape, key!, purpose);
    const importance = (z: T) => tf.mul(lowerLeaky(z, config.leakyAlpha), alive);
    const [u, delta] = [draw([S, sumC], PURPOSE.u), draw([S, M], PURPOSE.delta)];
    let source: T = draw([S, sumC], PURPOSE.adversary);
    const g = importance(logits);
    const attacked = (importanceOf: T, s: T) => recon(rows!, { mask: interpolate(importanceOf, tf.mul(s, alive)) });
    for (let k = 0; k < settings.adversarySteps; k++) {
      const [gradient] = tf.grads(s => attacked(g, s))([source]);
      source = tf.clipByValue(tf.add(source, tf.sign(gradient!)), 0, 1);
    }
    const loss = (z: T): T => {
      const lower = importance(z);
      const upper = tf.mul(upperLeaky(z, config.leakyAlpha), alive);
      const power = tf.exp(tf.mul(settings.p, tf.log(tf.add(upper, 1e-12))));
      const minimal = tf.div(tf.sum(tf.mul(power, alive)), S);
      const stochastic = recon(rows!, { mask: interpolate(lower, u), delta });
      const reconstruction = tf.mul(0.5, tf.add(stochastic, attacked(lower, source)));
      return tf.add(reconstruction, tf.mul(settings.coefficient, minimal));
    };
    const { value, grads } = tf.valueAndGrads(loss as (...z: tf.Tensor[]) => tf.Scalar)([logits]);
    const moved = adam(grads[0]!, m, v, { beta1: 0.9, beta2: 0.999, eps: 1e-8 }, c1!, c2!);
    logits.assign(tf.sub(logits, tf.mul(tf.mul(lr!, moved.direction), alive)));
    m.assign(moved.m);
    v.assign(moved.v);
    return { loss: value };
  });
  for (let n = 0; n < settings.steps; n++) {
    await tidyAsync(async () => {
      const scalars = {
        lr: settings.lr * cosine(n, settings.steps, 0),
        c1: 1 - 0.9 ** (n + 1),
        c2: 1 - 0.999 ** (n + 1),
      };
      const feeds = Object.fromEntries(Object.entries(scalars).map(([name, x]) => [name, tf.scalar(x)]));
      await (await step({ tokens: row, key: randomKey(settings.seed, n), ...feeds })).loss!.data();
    });
    await progress?.(n + 1);
  }
  const ci = tf.tidy(() => tf.mul(tf.clipByValue(logits, 0, 1), alive));
  const result = { ci: (await ci.data()) as Float32Array, alive: (await alive.data()) as Float32Array };
  tf.dispose([row, start, m, v, alive, logTarget, ci] as unknown as tf.TensorContainer);
  return result;
}

/** What the model says at the position under each regime, for a set [S,ΣC] of zeros and ones. */
export async function intervene(
  { problem, params }: LmRun,
  tokens: readonly number[],
  position: number,
  token: number | undefined,
  set: Float32Array,
  alive: Float32Array,
  settings: CircuitSettings,
  text: (token: number) => string,
): Promise<Regime[]> {
  const [S, sumC, M] = [tokens.length, totalC(problem.modules), problem.modules.length];
  return tidyAsync(async () => {
    const row = tf.tensor2d(Int32Array.from(tokens), [1, S], 'int32');
    const at = (logits: T): T => tf.logSoftmax(tf.slice(logits, [position, 0], [1, -1]));
    const under = (masks: Masks): T => at(maskedForward(problem, params, row, masks));
    const chosen = tf.tensor2d(set, [S, sumC]);
    const target = importances(problem, params, row).pass.output.logSoftmax();
    const logTarget = tf.slice(target, [position, 0], [1, -1]);
    const klTo = (predicted: T): T => tf.sum(tf.mul(tf.exp(logTarget), tf.sub(logTarget, predicted)));
    const draw = (shape: number[], n: number, purpose: number) =>
      uniform(shape, randomKey(settings.seed + 1, n), purpose);

    const stochastic = Array.from({ length: settings.draws }, (_, n) =>
      under({ mask: interpolate(chosen, draw([S, sumC], n, PURPOSE.u)), delta: draw([S, M], n, PURPOSE.delta) }),
    );
    const outside = tf.tensor2d(
      alive.map((a, i) => a * (1 - set[i]!)),
      [S, sumC],
    );
    const attacked = (s: T): Masks => ({ mask: tf.add(chosen, tf.mul(outside, s)) });
    let source: T = draw([S, sumC], 0, PURPOSE.adversary);
    const harm = (s: T): T => {
      const predicted = under(attacked(s));
      return token === undefined ? klTo(predicted) : tf.neg(tf.sum(tf.slice(predicted, [0, token], [1, 1])));
    };
    for (let k = 0; k < settings.interventionSteps; k++) {
      const [gradient] = tf.grads(harm as (s: tf.Tensor) => tf.Tensor)([source]);
      source = tf.clipByValue(tf.add(source, tf.mul(0.1, tf.sign(gradient!))), 0, 1);
    }
    const regimes: [Regime['regime'], T[]][] = [
      ['target', [logTarget]],
      ['only these', [under({ mask: chosen })]],
      ['stochastic', stochastic],
      ['adversarial', [under(attacked(source))]],
      ['without these', [under({ mask: tf.sub(1, chosen), delta: tf.ones([1, M]) })]],
    ];
    const shown = token ?? ((await tf.argMax(logTarget, 1).data())[0] as number);
    const result: Regime[] = [];
    for (const [regime, draws] of regimes) {
      const probs = (await tf.mean(tf.stack(draws.map(d => tf.exp(d))), 0).data()) as Float32Array;
      const kls = await Promise.all(draws.map(async d => (await klTo(d).data())[0]!));
      const top = probs.reduce((best, p, i) => (p > probs[best]! ? i : best), 0);
      const kl = kls.reduce((sum, x) => sum + x, 0) / kls.length;
      result.push({ regime, token: text(top), probability: probs[shown]!, kl });
    }
    return result;
  });
}

/** As many random alive pairs. */
function randomSet(set: Float32Array, alive: Float32Array, seed: number): Float32Array {
  const pairs = [...alive.keys()].filter(i => alive[i]! > 0);
  const draws = uniformArray(pairs.length, seed, 0, 53);
  const order = [...pairs.keys()].sort((a, b) => draws[a]! - draws[b]!);
  const chosen = new Float32Array(set.length);
  for (const k of order.slice(
    0,
    set.reduce((sum, x) => sum + x, 0),
  ))
    chosen[pairs[k]!] = 1;
  return chosen;
}

/** Finds the circuit and intervenes on it. */
export async function findCircuit(
  job: LmRun,
  question: { text: string; tokens: readonly number[]; position: number; token: number | undefined },
  settings: CircuitSettings,
  progress?: (step: number) => Promise<void>,
): Promise<Circuit> {
  const { text, tokens, position, token } = question;
  const { modules } = job.problem;
  const sumC = totalC(modules);
  const { ci, alive } = await optimise(job, tokens, position, token, settings, progress);
  const set = ci.map(x => Number(x > 0));
  const nodes = [...ci.keys()].flatMap((i): CircuitNode[] => {
    if (!(ci[i]! > 0)) return [];
    const [t, column] = [Math.floor(i / sumC), i % sumC];
    return [{ position: t, ...nameOf(modules, column), ci: ci[i]! }];
  });
  const textOf = (id: number) => tokenText(job, id);
  const regimes = (chosen: Float32Array) => intervene(job, tokens, position, token, chosen, alive, settings, textOf);
  return {
    ...{ formatVersion: 1, components: componentsHash(job.problem.config.out), settings, text, tokens: [...tokens] },
    ...{ position, token: token ?? null, alive: alive.reduce((sum, a) => sum + a, 0), nodes },
    interventions: await regimes(set),
    control: await regimes(randomSet(set, alive, settings.seed)),
  };
}

export function circuitTable({ nodes, alive, interventions, control }: Circuit): string {
  const cell = ({ token, probability, kl }: Regime) =>
    `${probability.toFixed(4).padStart(8)}${kl.toFixed(4).padStart(10)}  ${JSON.stringify(token).padEnd(14)}`;
  const rows = interventions.map((r, i) => `  ${r.regime.padEnd(15)}${cell(r)}${i > 0 ? cell(control[i]!) : ''}`);
  const head = `${'p'.padStart(8)}${'KL'.padStart(10)}  ${'says'.padEnd(14)}`;
  const titles = `${'the circuit'.padEnd(34)}as many random alive ones (control)`;
  const lines = [`${nodes.length} of ${alive} alive pairs of position and component`, `  ${''.padEnd(15)}${titles}`];
  return [...lines, `  ${''.padEnd(15)}${head}${head}`, ...rows].join('\n');
}

export const FLAGS = {
  text: 'string',
  position: 'string',
  token: 'string',
  steps: 'string',
  coefficient: 'string',
  json: 'boolean',
} as const;

/** The command. @returns the exit code */
export async function circuit(job: LmRun, flags: Flags): Promise<number> {
  const { text } = flags;
  if (typeof text !== 'string') return refuse('circuit: takes --text T');
  const tokens = encode(job, text);
  const position = numberFlag(flags, 'position', tokens.length - 1, { min: 0, max: tokens.length - 1, integer: true });
  const token = typeof flags.token === 'string' ? tokenId(job, flags.token) : undefined;
  const settings: CircuitSettings = {
    ...circuitDefaults,
    steps: numberFlag(flags, 'steps', circuitDefaults.steps, { min: 1, max: 2000, integer: true }),
    coefficient: numberFlag(flags, 'coefficient', circuitDefaults.coefficient, { min: 0, max: 1e6 }),
    seed: job.problem.config.seed,
  };
  let shown = performance.now();
  const made = await findCircuit(job, { text, tokens, position, token }, settings, async step => {
    if (performance.now() - shown < 5000) return;
    shown = performance.now();
    talk(`circuit: step ${step} of ${settings.steps}`);
  });
  if (flags.json) console.log(JSON.stringify(made));
  else {
    const name = crypto
      .createHash('sha256')
      .update(JSON.stringify([tokens, position, token]))
      .digest('hex')
      .slice(0, 12);
    const file = path.join(job.problem.config.out, 'circuits', `${name}.json`);
    writeAtomic(file, JSON.stringify(made));
    refreshPage(job.problem.config.out, job.problem.modules);
    console.log(`${circuitTable(made)}\n${file}`);
  }
  return 0;
}
