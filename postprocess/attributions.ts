/**
 * Dataset attributions: what feeds what over many texts.
 *
 *   npx tsx nano-param-decomp.ts attributions --run DIR [--minutes 5] [--positions 4096]
 *   npx tsx nano-param-decomp.ts attributions --run DIR --output-token T     who writes T's logit
 *
 * With α and g as in graph.ts, but in the forward of the components alone (no delta component), and sums over the
 * positions of training rows:
 *     A(c1→c2) = Σ α g_c1,   Aabs(c1→c2) = Σ sign(a_c2) α g_c1,
 *     normalised = A / [ (Σ g_c1) · √(mean a_c2²) ]
 * A token's embedding is a source too: its count takes the place of Σ g. Targets are the components whose mean g is
 * above a threshold, the most used first, until the time is up; a second start goes on. Memory: the activations of the
 * positions, and for each component its strongest sources and targets.
 */
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { importances, inputBatch, type T, tidyAsync, totalC, U, V } from '../nano-param-decomp.ts';
import {
  type AttributionSettings,
  type Attributions,
  attributionDefaults,
  type Source,
  type Strength,
} from './formats.ts';
import { acrossPositions, componentForm, leafGradients, type Reader, unembedding } from './forward.ts';
import { refreshPage } from './parts.ts';
import type { LmRun } from './run.ts';
import {
  componentsHash,
  type Flags,
  nameOf,
  numberFlag,
  readStage,
  refuse,
  talk,
  tokenId,
  writeAtomic,
} from './stages.ts';

/** A batch of rows: what doesn't change from target to target. */
interface Batch {
  form: ReturnType<typeof componentForm>;
  N: number;
  g: T<'N ΣC'>;
  fires: T<'N ΣC'>;
  weighted: T<'N C'>[]; // g a, by module
  tokens: Int32Array;
}
/** Sums over the positions, for one target: to every component, and to every token's embedding. */
interface Sums {
  components: { A: Float64Array; Aabs: Float64Array; together: Float64Array }; // [ΣC]
  tokens: { A: Float64Array; Aabs: Float64Array }; // [vocab]
}

/** Adds up one target's attributions over the batches. `column`: undefined for a coordinate of the output. */
async function attributeTarget(
  job: LmRun,
  batches: readonly Batch[],
  reader: Reader,
  vector: T<'d 1'>,
  column?: number,
) {
  const { modules, target } = job.problem;
  const sumC = totalC(modules);
  const sums: Sums = {
    components: { A: new Float64Array(sumC), Aabs: new Float64Array(sumC), together: new Float64Array(sumC) },
    tokens: { A: new Float64Array(target.arch.vocab), Aabs: new Float64Array(target.arch.vocab) },
  };
  // where no path crosses positions, the sign of a_c2 can wait until after the backward pass
  const local =
    modules.length === target.linears.length && !modules.some((_, i) => acrossPositions(batches[0]!.form, i, reader));
  for (const { form, N, g, fires, weighted, tokens } of batches) {
    await tidyAsync(async () => {
      const read = reader === 'output' ? form.final : form.inputs[reader];
      const a = tf.matMul(read as tf.Tensor2D, vector as tf.Tensor2D); // [N,1]
      const sign = tf.sign(a);
      const seed = tf.transpose(vector); // [1,d]
      const pass = (upstream: T) => leafGradients(form, reader, { ...form }, upstream);
      const plain = pass(tf.tile(seed, [N, 1]));
      const signed = local ? undefined : pass(tf.mul(sign, seed));
      /** Σ over positions of gradient · U_c · g a_c [C], and per position of gradient · embedding [N] */
      const reduce = (grads: typeof plain, factor?: T) => {
        const scaled = (x: T): T => (factor ? tf.mul(factor, x) : x);
        const parts = modules.map((m, i): T => {
          const gradient = grads.outputs[i];
          if (!gradient) return tf.zeros([m.C]);
          const outer = tf.matMul(weighted[i] as tf.Tensor2D, scaled(gradient) as tf.Tensor2D, true); // [C,dOut]
          return tf.sum(tf.mul(outer, U(job.params, m)), 1);
        });
        const embedded = grads.embedded ? tf.sum(tf.mul(scaled(grads.embedded), form.embedded), 1) : tf.zeros([N]);
        return [tf.concat(parts as tf.Tensor1D[]), embedded] as const;
      };
      const [A, ofTokens] = reduce(plain);
      const [Aabs, ofTokensAbs] = signed ? reduce(signed) : reduce(plain, sign);
      const own = column === undefined ? undefined : tf.slice(fires, [0, column], [N, 1]);
      const together = own ? tf.matMul(own as tf.Tensor2D, fires as tf.Tensor2D, true) : tf.zeros([1, g.shape[1]!]);
      const read4 = await Promise.all([A, Aabs, together, ofTokens, ofTokensAbs].map(x => x.data()));
      for (let c = 0; c < sumC; c++) {
        sums.components.A[c]! += read4[0]![c]!;
        sums.components.Aabs[c]! += read4[1]![c]!;
        sums.components.together[c]! += read4[2]![c]!;
      }
      for (const [n, token] of tokens.entries()) {
        sums.tokens.A[token]! += read4[3]![n]!;
        sums.tokens.Aabs[token]! += read4[4]![n]!;
      }
    });
  }
  return sums;
}

/** How often and how strongly every component acts, over the batches. */
async function totals(job: LmRun, batches: readonly Batch[]) {
  const sumC = totalC(job.problem.modules);
  const [g, fires, square] = [0, 1, 2].map(() => new Float64Array(sumC)) as [Float64Array, Float64Array, Float64Array];
  const counts = new Float64Array(job.problem.target.arch.vocab);
  let positions = 0;
  for (const batch of batches) {
    const a = tf.tidy(() => tf.concat(batch.form.acts, 1));
    const [x, y, z] = tf.tidy(() => [tf.sum(batch.g, 0), tf.sum(batch.fires, 0), tf.sum(tf.square(a), 0)]) as [T, T, T];
    const read = await Promise.all([x, y, z].map(t => t.data()));
    for (let c = 0; c < sumC; c++) {
      g[c]! += read[0]![c]!;
      fires[c]! += read[1]![c]!;
      square[c]! += read[2]![c]!;
    }
    for (const token of batch.tokens) counts[token]!++;
    positions += batch.N;
    tf.dispose([a, x, y, z]);
  }
  return { g, fires, square, counts, positions };
}

function makeBatches(job: LmRun, { positions, batchPositions }: AttributionSettings): Batch[] {
  const { data, problem, params } = job;
  const { seqLen, count } = data.train;
  const rows = Math.max(1, Math.min(count, Math.floor(positions / seqLen)));
  const size = Math.max(1, Math.floor(batchPositions / seqLen));
  const batches: Batch[] = [];
  for (let first = 0; first < rows; first += size) {
    const indices = Array.from({ length: Math.min(size, rows - first) }, (_, i) => first + i);
    const tokens = Int32Array.from(indices.flatMap(i => [...data.train.row(i)]));
    const made = tf.tidy(() => {
      const input = inputBatch(data.train, indices);
      const { g } = importances(problem, params, input);
      const { problem: _, params: __, B: ___, ...values } = componentForm(problem, params, input, false);
      const parts = tf.split(
        g,
        problem.modules.map(m => m.C),
        1,
      );
      const weighted = parts.map((x, i) => tf.mul(x, values.acts[i]!));
      return { values, g, fires: tf.cast(tf.greater(g, 0), 'float32'), weighted };
    });
    const form = { problem, params, B: indices.length, ...made.values };
    batches.push({ form, N: tokens.length, g: made.g, fires: made.fires, weighted: made.weighted, tokens });
  }
  return batches;
}

/** A number with so many significant digits. */
const short = (x: number) => Number(x.toPrecision(6));

/** The strongest by |Aabs|, at most `size`, kept in order. */
function keep<X extends Strength>(list: X[], item: X, size: number): void {
  let i = list.length;
  while (i > 0 && Math.abs(list[i - 1]!.Aabs) < Math.abs(item.Aabs)) i--;
  if (i >= size) return;
  list.splice(i, 0, item);
  if (list.length > size) list.pop();
}

/**
 * Attributes as many targets as the time allows, going on from `old`.
 * @param save called now and then with what there is
 */
export async function datasetAttributions(
  job: LmRun,
  settings: AttributionSettings,
  milliseconds: number,
  old?: Attributions,
  save?: (file: Attributions) => void,
): Promise<Attributions> {
  const { modules, target } = job.problem;
  const started = performance.now();
  const batches = makeBatches(job, settings);
  const { g, fires, square, counts, positions } = await totals(job, batches);
  const columns = [...g.keys()].filter(c => g[c]! / positions > settings.threshold).sort((a, b) => g[b]! - g[a]!);
  const named = (column: number) => nameOf(modules, column);
  const columnOf = (x: { module: string; index: number }) => modules.find(m => m.path === x.module)!.offset + x.index;
  const file: Attributions = old ?? {
    ...{ formatVersion: 1, components: '', settings, positions, alive: columns.length, complete: false },
    ...{ targets: [], feeds: [], outputs: [], leftOut: [] },
  };
  const feeds = new Map(file.feeds.map(f => [columnOf(f), f]));
  let saved = started;
  try {
    const dModel = target.arch.dModel;
    const cells = columns.length * dModel;
    if (cells > settings.outputCells && file.leftOut.length === 0) file.leftOut.push(`outputs: ${cells} numbers`);
    if (cells <= settings.outputCells && file.outputs.length === 0) {
      file.outputs = columns.map(c => ({ ...named(c), A: [] }));
      for (let d = 0; d < dModel; d++) {
        const vector = tf.tidy(() =>
          tf
            .oneHot(tf.tensor1d([d], 'int32'), dModel)
            .reshape([dModel, 1])
            .toFloat(),
        );
        const { components } = await attributeTarget(job, batches, 'output', vector);
        vector.dispose();
        for (const [k, c] of columns.entries()) file.outputs[k]!.A.push(short(components.A[c]!));
      }
    }
    const done = new Set(file.targets.map(columnOf));
    const left = columns.filter(c => !done.has(c));
    for (const column of left) {
      // at least one, so that many short starts come to an end too
      if (column !== left[0] && performance.now() - started > milliseconds) break;
      const reader = modules.findLastIndex(({ offset }) => offset <= column);
      const m = modules[reader]!;
      const vector = tf.tidy(() => tf.slice(V(job.params, m), [0, column - m.offset], [m.dIn, 1]));
      const sums = await attributeTarget(job, batches, reader, vector, column);
      vector.dispose();
      const scale = Math.sqrt(square[column]! / positions);
      const sources: (Source & Strength)[] = [];
      let total = 0;
      const strength = (A: number, Aabs: number, weight: number, pmi: number | null): Strength => ({
        ...{
          A: short(A),
          Aabs: short(Aabs),
          normalised: short(weight > 0 && scale > 0 ? A / (weight * scale) : 0),
          pmi,
        },
      });
      const { A, Aabs, together } = sums.components;
      for (let c = 0; c < A.length; c++) {
        if (Aabs[c] === 0 && A[c] === 0) continue;
        total += Math.abs(Aabs[c]!);
        const n = together[c]!;
        const pmi = n > 0 ? short(Math.log((n * positions) / (fires[c]! * fires[column]!))) : null;
        const found = strength(A[c]!, Aabs[c]!, g[c]!, pmi);
        keep(sources, { ...named(c), ...found }, settings.strongest);
        const list = feeds.get(c) ?? { ...named(c), targets: [] };
        feeds.set(c, list);
        keep(list.targets, { ...named(column), ...found }, settings.strongest);
      }
      for (let token = 0; token < counts.length; token++) {
        if (counts[token] === 0 || sums.tokens.Aabs[token] === 0) continue;
        total += Math.abs(sums.tokens.Aabs[token]!);
        const found = strength(sums.tokens.A[token]!, sums.tokens.Aabs[token]!, counts[token]!, null);
        keep(sources, { token, ...found }, settings.strongest);
      }
      const kept = sources.reduce((sum, s) => sum + Math.abs(s.Aabs), 0);
      file.targets.push({ ...named(column), sources, share: total > 0 ? short(kept / total) : 1 });
      if (performance.now() - saved > 10_000) {
        file.feeds = [...feeds.values()];
        save?.(file);
        saved = performance.now();
      }
      await new Promise(setImmediate); // a signal may come in
    }
    file.feeds = [...feeds.values()];
    file.complete = file.targets.length === columns.length;
    save?.(file);
    return file;
  } finally {
    for (const { form, g: ci, fires: f, weighted } of batches) {
      const { problem: _, params: __, B: ___, ...tensors } = form;
      tf.dispose([tensors, ci, f, weighted] as unknown as tf.TensorContainer);
    }
  }
}

export const FLAGS = { minutes: 'string', positions: 'string', 'output-token': 'string', json: 'boolean' } as const;

/** The command. @returns the exit code */
export async function attributions(job: LmRun, flags: Flags): Promise<number> {
  const dir = job.problem.config.out;
  const file = path.join(dir, 'attributions.json');
  const settings: AttributionSettings = {
    ...attributionDefaults,
    positions: numberFlag(flags, 'positions', attributionDefaults.positions, 1, 1e9, true),
  };
  const components = componentsHash(dir);
  const old = readStage<Attributions>(file, components);
  if (typeof flags['output-token'] === 'string')
    return printWriters(job, old, flags['output-token'], flags.json === true);
  const same = old && JSON.stringify(old.settings) === JSON.stringify(settings) ? old : undefined;
  const minutes = numberFlag(flags, 'minutes', 5, 0, 1e6);
  if (!same?.complete) {
    const made = await datasetAttributions(job, settings, minutes * 60_000, same, made => {
      writeAtomic(file, JSON.stringify({ ...made, components }));
      talk(`attributions: ${made.targets.length} of ${made.alive} targets`);
    });
    refreshPage(dir, job.problem.modules);
    if (!made.complete) talk('the time is up; the same command goes on');
  }
  console.log(file);
  return 0;
}

/** Components by what they write to a token's logit minus the mean logit. */
async function printWriters(job: LmRun, old: Attributions | undefined, text: string, json: boolean): Promise<number> {
  const { out } = job.problem.config;
  if (!old?.outputs.length)
    return refuse(`${out}: no outputs in attributions.json; attributions --run ${out} makes it`);
  const id = tokenId(job, text);
  const row = tf.tidy(() => {
    const W = unembedding(job.problem.target);
    return tf.sub(tf.gather(W, tf.tensor1d([id], 'int32')).flatten(), tf.mean(W, 0));
  });
  const w = await row.data();
  row.dispose();
  const written = old.outputs.map(({ module, index, A }) => ({
    ...{ module, index, A: short(A.reduce((sum, x, d) => sum + x * w[d]!, 0)) },
  }));
  written.sort((a, b) => Math.abs(b.A) - Math.abs(a.A));
  const shown = written.slice(0, 20);
  console.log(json ? JSON.stringify(shown) : shown.map(s => `${s.module}:${s.index}  ${s.A}`).join('\n'));
  return 0;
}
