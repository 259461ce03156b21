/**
 * Measures that do not flatter, beside those of the original: taken at slow evaluations, at a run's end and by `eval`.
 *
 *   eval/pgd/<n>                          KL (or MSE) after n sign steps of a fresh adversary: n = 0, its random start, and
 *                                         --pgd-eval-n-steps times 1, 2, 4, 8, 16 (20, 40, 80, 160, 320)
 *   eval/pgd/flat_from                    the first of these n (not 0) after which doubling adds less than 5 %; absent: none
 *                                         (from one start: where it is flat another may find a hole, see `eval --seed`)
 *   eval/loss/RelativeFaithfulnessLoss/<module>, /mean, /worst    ‖W − (V U)ᵀ‖² / ‖W‖², where the loss is a mean over all
 *   eval/l0/<t>_<module>, _total          components with g above t = 0.0, 0.01 and 0.1 at a position
 *   eval/g_bins/<bin>_<module>, _total    components with g in a bin at a position: they add up to C
 *   eval/z/min/<module>, max, /total      the range of the CI function's logits
 *   eval/alive/positions                  training positions that decide who is alive:
 *   eval/alive/n_mean_ci, n_ever          by a mean g of at least 1e-6; by g > 0 at one of them
 *   eval/<kl>_alive_mean_ci, _alive_ever  KL (ce_kl/kl) or MSE (recon/mse) on held-out rows with all others deleted
 */
import * as tf from '@tensorflow/tfjs';
import {
  evaluationKey,
  firstRows,
  importances,
  inBatches,
  indicator,
  inputBatch,
  type Metrics,
  maskedForward,
  numbers,
  ownLinear,
  type Problem,
  pgdStart,
  pgdStep,
  type Run,
  sum,
  type T,
  tidyAsync,
  totalC,
  U,
  V,
} from '../nano-param-decomp.ts';

/** What g is counted above; 1 itself is a bin, since g is clamped there, as it is at 0. */
const THRESHOLDS = [0, 0.01, 0.1, 0.5, 0.9];
export const BINS = ['0', '0-0.01', '0.01-0.1', '0.1-0.5', '0.5-0.9', '0.9-1', '1'] as const;
const L0_THRESHOLDS = { '0.0': 0, 0.01: 1, 0.1: 2 }; // by their place in THRESHOLDS
const FACTORS = [1, 2, 4, 8, 16]; // of --pgd-eval-n-steps
const FLAT = 1.05; // a rung is flat where twice the steps give less than this times its loss
const ALIVE_POSITIONS = 32_768; // at least, where there are so many: in whole rows
const HELD_OUT_POSITIONS = 8192;
const ALIVE_MEAN_CI = 1e-6;

/** The rungs of the adversary's ladder, in steps; none where the fresh adversary makes no step. */
export const rungsOf = (pgdEvalNSteps: number) => (pgdEvalNSteps > 0 ? FACTORS.map(f => f * pgdEvalNSteps) : []);

/** The first rung after which doubling the steps adds less than 5 %. `losses`: of the rungs, each twice the one before. */
export function flatFrom(rungs: readonly number[], losses: readonly number[]): number | undefined {
  return rungs.find((_, i) => i + 1 < rungs.length && losses[i + 1]! < FLAT * losses[i]!);
}

/** ‖W − (V U)ᵀ‖² / ‖W‖² of each module [M]. */
export function relativeFaithfulness({
  problem: { target, modules },
  params,
}: Pick<Run, 'problem' | 'params'>): T<'M'> {
  const ratios = modules.map(m => {
    const W = target.weights.get(m.path)!; // Wᵀ
    const rest = tf.sub(W, tf.matMul(V(params, m) as tf.Tensor2D, U(params, m) as tf.Tensor2D));
    return rest.square().sum().div(W.square().sum().maximum(1e-30)); // a matrix of zeros
  });
  return tf.stack(ratios);
}

/** Reconstruction by the components whose mask is 1, all others deleted. */
export function aliveAlone(problem: Problem, params: Run['params'], inputs: T<'B S'>, mask: T<'1 ΣC'>): T {
  const { target } = problem;
  const own = target.forward(inputs, ownLinear(target));
  return target.compare.measure(own, maskedForward(problem, params, inputs, { mask }));
}

const one = async (x: T) => (await numbers(x))[0]!;

/**
 * The adversary's losses after 0 steps and at each rung. A rung goes on where the one before it ended, which is the same
 * as to start anew: a step depends on the source alone. For the same reason a source that is back where it was two steps
 * ago, as one that has found its place is, makes no further steps: rungs an even number of steps on have its loss. Disposes
 * of the start.
 */
export async function climb(
  rungs: readonly number[],
  start: T<'1 ΣC+M'>,
  step: (source: T<'1 ΣC+M'>) => Promise<{ loss: T; next: T }>,
): Promise<number[]> {
  const losses: number[] = [];
  let [source, last, there] = [start, 0, new Float32Array()]; // the last rung, and its source
  for (let steps = 0; losses.length <= rungs.length; steps++) {
    if (steps === last + 2 && rungs.every(rung => rung <= last || (rung - last) % 2 === 0)) {
      const here = await numbers(source);
      if (there.every((x, i) => x === here[i]))
        losses.push(...rungs.slice(losses.length - 1).map(() => losses.at(-1)!));
      if (losses.length > rungs.length) break;
    }
    const isRung = steps === 0 || rungs.includes(steps);
    if (isRung) [last, there] = [steps, (await numbers(source)).slice()];
    const { loss, next } = await step(source);
    if (isRung) losses.push(await one(loss));
    tf.dispose([source, loss]);
    source = next;
  }
  source.dispose();
  return losses;
}

/**
 * Compiles the measures of a run. Rows are those of the evaluation, in the same batches and with the adversary's same
 * random start: the first rung is eval/loss/PGDReconLoss.
 */
export function compileMeasures({ engine, problem, params, data }: Omit<Run, 'trained'>) {
  const { modules, config, target } = problem;
  const { metric } = target.compare;
  const sumC = totalC(modules);
  const read = engine.compile('read', ({ inputs }: Record<'inputs', T>) => {
    const { pass, z, g } = importances(problem, params, inputs);
    const above = [...THRESHOLDS.map(t => g.greater(t)), g.greaterEqual(1)];
    return {
      output: pass.output,
      g,
      above: tf.stack(above.map(count => indicator(count).mean(0))), // [6,ΣC]
      zMin: z.min(0),
      zMax: z.max(0),
    };
  });
  type Rung = Record<'inputs' | 'output' | 'g' | 'source', T>;
  // The target's output and the importances are fed: they do not change while the source moves.
  const ladder = engine.compile('ladder', ({ inputs, output, g, source }: Rung) =>
    pgdStep(problem, params, inputs, source, { pass: { inputs, output, acts: {}, outputs: {} }, g }),
  );
  const use = engine.compile('use', ({ inputs }: Record<'inputs', T>) => {
    const { g } = importances(problem, params, inputs);
    return { mean: g.mean(0), max: g.max(0) };
  });
  const alone = engine.compile('alive', ({ inputs, mask }: Record<'inputs' | 'mask', T>) => ({
    loss: aliveAlone(problem, params, inputs, mask),
  }));
  const rungs = rungsOf(config.pgdEvalNSteps);
  /** Importances, their logits and the ladder, over the evaluation's rows. */
  async function onRows(rows = firstRows(data.heldOut, config.evalBatchSize)) {
    const above = THRESHOLDS.concat(1).map(() => new Float64Array(sumC)); // mean over positions
    const [zMin, zMax] = [new Float64Array(sumC).fill(Infinity), new Float64Array(sumC).fill(-Infinity)];
    const losses = [0, ...rungs].map(() => 0);
    for (const [b, indices] of inBatches(rows.count, config.evalBatchSize).entries()) {
      const share = indices.length / rows.count;
      await tidyAsync(async () => {
        const inputs = inputBatch(rows, indices);
        const found = await read({ inputs });
        const values = await Promise.all([found.above, found.zMin, found.zMax].map(numbers));
        for (let c = 0; c < sumC; c++) {
          for (const [t, means] of above.entries()) means[c]! += share * values[0]![t * sumC + c]!;
          zMin[c] = Math.min(zMin[c]!, values[1]![c]!);
          zMax[c] = Math.max(zMax[c]!, values[2]![c]!);
        }
        if (rungs.length === 0) return;
        const { output, g } = found;
        const step = (source: T) => ladder({ inputs, output, g, source });
        const climbed = await climb(rungs, pgdStart(problem, evaluationKey(config, b)), step);
        for (const [i, loss] of climbed.entries()) losses[i]! += share * loss;
      });
    }
    const metrics: Metrics = {};
    for (const [i, steps] of (rungs.length > 0 ? [0, ...rungs] : []).entries())
      metrics[`eval/pgd/${steps}`] = losses[i]!;
    const flat = flatFrom(rungs, losses.slice(1));
    if (flat !== undefined) metrics['eval/pgd/flat_from'] = flat;
    for (const { path, offset, C } of [...modules, { path: 'total', offset: 0, C: sumC }]) {
      const count = above.map(means => sum(means.subarray(offset, offset + C)));
      for (const [name, t] of Object.entries(L0_THRESHOLDS)) metrics[`eval/l0/${name}_${path}`] = count[t]!;
      for (const [i, bin] of BINS.entries())
        metrics[`eval/g_bins/${bin}_${path}`] = (i === 0 ? C : count[i - 1]!) - (count[i] ?? 0);
      metrics[`eval/z/min/${path}`] = zMin.subarray(offset, offset + C).reduce((a, b) => Math.min(a, b));
      metrics[`eval/z/max/${path}`] = zMax.subarray(offset, offset + C).reduce((a, b) => Math.max(a, b));
    }
    return metrics;
  }

  async function aliveOnes() {
    const size = config.evalBatchSize;
    const train = firstRows(data.train, Math.ceil(ALIVE_POSITIONS / data.train.seqLen));
    const [meanCi, max] = [new Float64Array(sumC), new Float64Array(sumC)];
    for (const indices of inBatches(train.count, size))
      await tidyAsync(async () => {
        const found = await use({ inputs: inputBatch(train, indices) });
        const [mean, highest] = await Promise.all([found.mean, found.max].map(numbers));
        for (let c = 0; c < sumC; c++) {
          meanCi[c]! += (mean![c]! * indices.length) / train.count;
          max[c] = Math.max(max[c]!, highest![c]!);
        }
      });
    const metrics: Metrics = { 'eval/alive/positions': train.count * train.seqLen };
    const alive = {
      mean_ci: Float32Array.from(meanCi, ci => Number(ci >= ALIVE_MEAN_CI)),
      ever: Float32Array.from(max, g => Number(g > 0)),
    };
    const heldOut = firstRows(data.heldOut, Math.ceil(HELD_OUT_POSITIONS / data.heldOut.seqLen));
    for (const [by, isAlive] of Object.entries(alive)) {
      let mean = 0;
      for (const indices of inBatches(heldOut.count, size))
        mean += await tidyAsync(async () => {
          const feeds = { inputs: inputBatch(heldOut, indices), mask: tf.tensor2d(isAlive, [1, sumC]) };
          return ((await one((await alone(feeds)).loss)) * indices.length) / heldOut.count;
        });
      metrics[`eval/alive/n_${by}`] = sum(isAlive);
      metrics[`eval/${metric}_alive_${by}`] = mean;
    }
    return metrics;
  }

  async function faithfulness() {
    const ratios = await tidyAsync(() => numbers(relativeFaithfulness({ problem, params })));
    const name = 'eval/loss/RelativeFaithfulnessLoss';
    const metrics: Metrics = { [`${name}/mean`]: sum(ratios) / modules.length, [`${name}/worst`]: Math.max(...ratios) };
    for (const [i, m] of modules.entries()) metrics[`${name}/${m.path}`] = ratios[i]!;
    return metrics;
  }

  /** `rows`: the held-out ones that are evaluated, if not the run's own evaluation batch. */
  return async (rows?: typeof data.heldOut): Promise<Metrics> => ({
    ...(await faithfulness()),
    ...(await onRows(rows)),
    ...(await aliveOnes()),
  });
}

/** The ladder among the metrics of an evaluation: [steps, loss], from 0 steps up; empty where there is none. */
export function ladderOf(metrics: Readonly<Metrics>): [steps: number, loss: number][] {
  const rungs = Object.keys(metrics).flatMap(name => /^eval\/pgd\/(\d+)$/.exec(name)?.[1] ?? []);
  return rungs.map((n): [number, number] => [+n, metrics[`eval/pgd/${n}`]!]).sort((a, b) => a[0] - b[0]);
}

/** The module that is reconstructed worst, by relative faithfulness. */
export function worstModule(metrics: Readonly<Metrics>): { module: string; ratio: number } | undefined {
  const of = Object.entries(metrics).flatMap(([name, ratio]) => {
    const module = /^eval\/loss\/RelativeFaithfulnessLoss\/(?!(?:mean|worst)$)(.*)$/.exec(name)?.[1];
    return module === undefined ? [] : [{ module, ratio }];
  });
  return of.length > 0 ? of.reduce((a, b) => (b.ratio > a.ratio ? b : a)) : undefined;
}
