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
import { importances, inputBatch, type Module, type T, totalC, U, V } from '../nano-param-decomp.ts';
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
  firings: Firings[]; // by module
  g: Float32Array; // [N,ΣC]
  tokens: Int32Array;
}
/** Where a module's components fire, position by position: a sum over g a has no other terms. */
interface Firings {
  start: Int32Array; // [N + 1]: the entries of position n are those from start[n] to start[n + 1]
  index: Int32Array; // of the component
  weight: Float32Array; // g a
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
  written: readonly Float32Array[], // U [C,dOut] of each module
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
  // where no path crosses positions, a position can be a row of its own, and the sign of a_c2 wait
  const local =
    modules.length === target.linears.length && !modules.some((_, i) => acrossPositions(batches[0]!.form, i, reader));
  for (const { form, N, g, firings, tokens } of batches) {
    const made = tf.tidy(() => {
      const read = reader === 'output' ? form.final : form.inputs[reader];
      const sign = tf.sign(tf.matMul(read as tf.Tensor2D, vector as tf.Tensor2D)); // of a_c2, [N,1]
      const seed = tf.transpose(vector); // [1,d]
      const pass = (upstream: T) => {
        const { embedded, outputs } = leafGradients(form, reader, { ...form, ...(local && { B: N }) }, upstream);
        return { outputs, embedded: embedded && tf.sum(tf.mul(embedded, form.embedded), 1) };
      };
      return { sign, plain: pass(tf.tile(seed, [N, 1])), signed: local ? undefined : pass(tf.mul(sign, seed)) };
    });
    const numbers = async (x: T | undefined) => x && ((await x.data()) as Float32Array);
    const sign = (await numbers(made.sign))!;
    const { A, Aabs, together } = sums.components;
    for (const [i, { offset, dOut }] of modules.entries()) {
      const gradient = await numbers(made.plain.outputs[i]);
      const signed = await numbers(made.signed?.outputs[i]);
      if (!gradient) continue;
      const { start, index, weight } = firings[i]!;
      const U = written[i]!;
      for (let n = 0; n < N; n++) {
        for (let e = start[n]!; e < start[n + 1]!; e++) {
          const c = index[e]!;
          const alpha = weight[e]! * dot(U, c * dOut, gradient, n * dOut, dOut); // α g_c1
          A[offset + c]! += alpha;
          Aabs[offset + c]! += signed ? weight[e]! * dot(U, c * dOut, signed, n * dOut, dOut) : sign[n]! * alpha;
        }
      }
      if (column === undefined) continue;
      for (let n = 0; n < N; n++) {
        if (!(g[n * sumC + column]! > 0)) continue;
        for (let e = start[n]!; e < start[n + 1]!; e++) together[offset + index[e]!]!++;
      }
    }
    const [ofToken, signedOfToken] = [await numbers(made.plain.embedded), await numbers(made.signed?.embedded)];
    for (const [n, token] of ofToken ? tokens.entries() : []) {
      sums.tokens.A[token]! += ofToken![n]!;
      sums.tokens.Aabs[token]! += signedOfToken?.[n] ?? sign[n]! * ofToken![n]!;
    }
    tf.dispose(made as unknown as tf.TensorContainer);
  }
  return sums;
}

/** The inner product of d numbers of two matrices. */
function dot(x: Float32Array, i: number, y: Float32Array, j: number, d: number): number {
  let sum = 0;
  for (let k = 0; k < d; k++) sum += x[i + k]! * y[j + k]!;
  return sum;
}

/** How often and how strongly every component acts, over the batches. */
async function totals(job: LmRun, batches: readonly Batch[]) {
  const sumC = totalC(job.problem.modules);
  const [g, fires, square] = [0, 1, 2].map(() => new Float64Array(sumC)) as [Float64Array, Float64Array, Float64Array];
  const counts = new Float64Array(job.problem.target.arch.vocab);
  let positions = 0;
  for (const { form, N, g: own, tokens } of batches) {
    const squares = tf.tidy(() => tf.sum(tf.square(tf.concat(form.acts, 1)), 0));
    for (const [c, x] of (await squares.data()).entries()) square[c]! += x;
    squares.dispose();
    for (let n = 0; n < N; n++) {
      for (let c = 0; c < sumC; c++) {
        const x = own[n * sumC + c]!;
        if (!(x > 0)) continue;
        g[c]! += x;
        fires[c]!++;
      }
    }
    for (const token of tokens) counts[token]!++;
    positions += N;
  }
  return { g, fires, square, counts, positions };
}

async function makeBatches(job: LmRun, { positions, batchPositions }: AttributionSettings): Promise<Batch[]> {
  const { data, problem, params } = job;
  const { modules } = problem;
  const { seqLen, count } = data.train;
  const rows = Math.max(1, Math.min(count, Math.floor(positions / seqLen)));
  const size = Math.max(1, Math.floor(batchPositions / seqLen));
  const batches: Batch[] = [];
  for (let first = 0; first < rows; first += size) {
    const indices = Array.from({ length: Math.min(size, rows - first) }, (_, i) => first + i);
    const tokens = Int32Array.from(indices.flatMap(i => [...data.train.row(i)]));
    const made = tf.tidy(() => {
      const input = inputBatch(data.train, indices);
      const { problem: _, params: __, B: ___, ...values } = componentForm(problem, params, input, false);
      return { values, g: importances(problem, params, input).g };
    });
    const g = (await made.g.data()) as Float32Array;
    made.g.dispose();
    const acts = (await Promise.all(made.values.acts.map(a => a.data()))) as Float32Array[];
    const N = tokens.length;
    const firings = modules.map((m, i) => firingsOf(g, acts[i]!, N, totalC(modules), m));
    batches.push({ form: { problem, params, B: indices.length, ...made.values }, N, firings, g, tokens });
  }
  return batches;
}

function firingsOf(g: Float32Array, acts: Float32Array, N: number, sumC: number, { offset, C }: Module): Firings {
  const start = new Int32Array(N + 1);
  const index: number[] = [];
  const weight: number[] = [];
  for (let n = 0; n < N; n++) {
    for (let c = 0; c < C; c++) {
      const ci = g[n * sumC + offset + c]!;
      if (!(ci > 0)) continue;
      index.push(c);
      weight.push(ci * acts[n * C + c]!);
    }
    start[n + 1] = index.length;
  }
  return { start, index: Int32Array.from(index), weight: Float32Array.from(weight) };
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
  const batches = await makeBatches(job, settings);
  const written = (await Promise.all(modules.map(m => U(job.params, m).data()))) as Float32Array[];
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
        const { components } = await attributeTarget(job, batches, written, 'output', vector);
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
      const sums = await attributeTarget(job, batches, written, reader, vector, column);
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
    for (const { form } of batches) {
      const { problem: _, params: __, B: ___, ...tensors } = form;
      tf.dispose(tensors as unknown as tf.TensorContainer);
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
    positions: numberFlag(flags, 'positions', attributionDefaults.positions, { min: 1, max: 1e9, integer: true }),
  };
  const components = componentsHash(dir);
  const old = readStage<Attributions>(file, components);
  if (typeof flags['output-token'] === 'string')
    return printWriters(job, old, flags['output-token'], flags.json === true);
  const same = old && JSON.stringify(old.settings) === JSON.stringify(settings) ? old : undefined;
  const minutes = numberFlag(flags, 'minutes', 5, { min: 0, max: 1e6 });
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
