/**
 * Prompt graphs: what feeds what on one text.
 *
 *   npx tsx nano-param-decomp.ts graph --run DIR                 the page's held-out passages, into graphs.json
 *   npx tsx nano-param-decomp.ts graph --run DIR --text T        this text as well
 *   npx tsx nano-param-decomp.ts graph --run DIR --text T --json this text, on standard output alone
 *   … --viewer-json FILE                                         for attribution-graph viewers (circuit-tracer's page)
 *
 * Nodes are a component c at a position t where its causal importance g is above 0, the embedding of every position, and
 * the likeliest next tokens. The edge from c1 at s to c2 at t weighs ∂a_c2(t)/∂a_c1(s) · a_c1(s), in the component form
 * of the forward (forward.ts), the delta component on: what of a_c2(t), to first order, comes from c1 at s by a path
 * through no other component. From an embedding: gradient · embedding. To a next token: of its logit minus the mean
 * logit. Edges join s = t; only the keys and values of an attention reach its o from s < t.
 */
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { importances, type T, U, V } from '../nano-param-decomp.ts';
import {
  type GraphEdge,
  type GraphNode,
  type GraphSettings,
  type GraphsFile,
  graphDefaults,
  type PromptGraph,
} from './formats.ts';
import {
  acrossPositions,
  type ComponentForm,
  componentForm,
  leafGradients,
  networkOrder,
  type Reader,
  unembedding,
} from './forward.ts';
import { refreshPage } from './parts.ts';
import type { LmRun } from './run.ts';
import {
  componentsHash,
  encode,
  type Flags,
  numberFlag,
  readStage,
  refuse,
  talk,
  tokenText,
  writeAtomic,
} from './stages.ts';
import { viewerGraph } from './viewer.ts';

/** A number that is attributed: `vector` · (what the reader reads at this position). */
export interface Wanted {
  reader: Reader;
  position: number;
  vector: Float32Array;
}
/** Where it comes from, α by source: everything at its own position, and what reaches it from earlier ones. */
export interface Incoming {
  embedding: number;
  same: (Float32Array | undefined)[]; // by module [C]; undefined: no path
  across: (Float32Array | undefined)[]; // by module [(t + 1)·C], positions 0 … t; undefined: doesn't cross positions
}

/**
 * Attributes many numbers of one text. Targets of one reader are batched: a copy of the text for each, one backward
 * pass for all of them; a copy ends with the last position that any of them reads.
 */
export async function attribute(
  form: ComponentForm, // of one row
  wanted: readonly Wanted[],
  batchPositions: number,
  each: (which: number, incoming: Incoming) => void,
  progress: (done: number) => void | Promise<void> = () => new Promise(setImmediate), // lets signals in
): Promise<void> {
  let done = 0;
  const readers = new Map<Reader, number[]>();
  for (const [k, { reader }] of wanted.entries()) readers.set(reader, [...(readers.get(reader) ?? []), k]);
  for (const [reader, targets] of readers) {
    targets.sort((a, b) => wanted[b]!.position - wanted[a]!.position);
    for (let first = 0; first < targets.length; ) {
      const L = wanted[targets[first]!]!.position + 1;
      const batch = targets.slice(first, first + Math.max(1, Math.floor(batchPositions / L)));
      first += batch.length;
      const read = await attributeBatch(
        form,
        reader,
        L,
        batch.map(k => wanted[k]!),
      );
      for (const [i, k] of batch.entries()) each(k, read(i));
      done += batch.length;
      await progress(done);
    }
  }
}

async function attributeBatch(form: ComponentForm, reader: Reader, L: number, batch: readonly Wanted[]) {
  const { params, problem, acts } = form;
  const { modules } = problem;
  const K = batch.length;
  const width = batch[0]!.vector.length;
  const upstream = new Float32Array(K * L * width);
  for (const [k, { position, vector }] of batch.entries()) upstream.set(vector, (k * L + position) * width);
  const copies = (x: T): T => tf.tile(tf.slice(x, [0, 0], [L, x.shape[1]!]), [K, 1]);
  const results = tf.tidy(() => {
    const positions = tf.tensor1d(
      batch.map(w => w.position),
      'int32',
    );
    const rows = tf.tensor1d(
      batch.map((w, k) => k * L + w.position),
      'int32',
    );
    const leaves = { embedded: copies(form.embedded), outputs: form.outputs.map(copies), B: K };
    const grads = leafGradients(form, reader, leaves, tf.tensor2d(upstream, [K * L, width]));
    const out: Record<string, T> = {};
    const own = (x: T): T => tf.gather(x, rows);
    if (grads.embedded) out.embedding = tf.sum(tf.mul(own(grads.embedded), tf.gather(form.embedded, positions)), 1);
    for (const [i, m] of modules.entries()) {
      const g = grads.outputs[i];
      if (!g) continue;
      const crosses = acrossPositions(form, i, reader);
      const perComponent = tf.matMul((crosses ? g : own(g)) as tf.Tensor2D, U(params, m) as tf.Tensor2D, false, true);
      const values = crosses ? copies(acts[i]!) : tf.gather(acts[i]!, positions);
      out[`${crosses ? 'across' : 'same'}${i}`] = tf.mul(perComponent, values);
    }
    return out;
  });
  const read: Record<string, Float32Array> = {};
  for (const [name, x] of Object.entries(results)) read[name] = (await x.data()) as Float32Array;
  tf.dispose(results);
  return (k: number): Incoming => ({
    embedding: read.embedding?.[k] ?? 0,
    same: modules.map(({ C }, i) => read[`same${i}`]?.subarray(k * C, (k + 1) * C)),
    across: modules.map(({ C }, i) => read[`across${i}`]?.subarray(k * L * C, (k * L + batch[k]!.position + 1) * C)),
  });
}

/** Weights below this share of a target's strongest are what float32 leaves of a gradient that is 0. */
const ROUNDING = 1e-7;

/** A node with what attributes it; embeddings are no targets. */
type Target = { node: GraphNode; wanted?: Wanted };

/** The graph of one text. */
export async function promptGraph(
  job: LmRun,
  tokens: readonly number[],
  given: Partial<GraphSettings> = {},
  also: readonly { position: number; column: number }[] = [], // nodes, though not alive; nothing's sources then
  progress?: (done: number, total: number) => void | Promise<void>,
): Promise<PromptGraph> {
  const settings = { ...graphDefaults, ...given };
  const { problem, params } = job;
  const { modules, target } = problem;
  const S = tokens.length;
  const kept = tf.tidy(() => {
    const input = tf.tensor2d(Int32Array.from(tokens), [1, S], 'int32');
    const { g, pass } = importances(problem, params, input);
    const form = componentForm(problem, params, input, true);
    const W = unembedding(target);
    const logits = tf.matMul(form.final as tf.Tensor2D, W as tf.Tensor2D, false, true);
    const readings = { g, probs: pass.output.softmax(), logits: tf.sub(logits, tf.mean(logits, 1, true)) };
    const { embedded, inputs, acts, outputs, deltas } = form;
    return { readings, meanW: tf.mean(W, 0), embedded, inputs, acts, outputs, deltas: deltas! };
  });
  const form: ComponentForm = { problem, params, B: 1, ...kept, final: kept.embedded };
  try {
    const numbers = async (x: T) => (await x.data()) as Float32Array;
    const [g, probs, logits, meanW] = await Promise.all([...Object.values(kept.readings), kept.meanW].map(numbers));
    const acts = await Promise.all(kept.acts.map(numbers));
    const vectors = await Promise.all(modules.map(m => numbers(tf.tidy(() => tf.transpose(V(params, m))))));
    const targets = tokens.map((token, position): Target => ({ node: { id: position, position, embedding: token } }));
    const leftOut = { nodes: 0, edges: 0 };
    const sumC = g!.length / S;
    const order = networkOrder(problem);
    /** nodes of each module and position: [index, id] */
    const alive = modules.map(() => tokens.map((): [index: number, id: number][] => []));
    for (const position of tokens.keys()) {
      const fire = order.flatMap(i => {
        const { offset, C, path: module } = modules[i]!;
        const indices = Array.from({ length: C }, (_, index) => index);
        const ci = (index: number) => g![position * sumC + offset + index]!;
        const asked = (index: number) => also.some(a => a.position === position && a.column === offset + index);
        return indices
          .filter(index => ci(index) > 0 || asked(index))
          .map(index => ({ i, module, index, ci: ci(index) }));
      });
      const least = fire.map(f => f.ci).sort((a, b) => b - a)[settings.nodesPerPosition - 1] ?? 0;
      const nodes = fire.filter(f => f.ci >= least).slice(0, settings.nodesPerPosition);
      leftOut.nodes += fire.length - nodes.length;
      for (const { i, module, index, ci } of nodes) {
        const { C, dIn } = modules[i]!;
        const id = targets.length;
        const node = { id, position, module, index, ci, activation: acts[i]![position * C + index]! };
        if (ci > 0) alive[i]![position]!.push([index, id]);
        const vector = vectors[i]!.subarray(index * dIn, (index + 1) * dIn);
        targets.push({ node, wanted: { reader: i, position, vector } });
      }
    }
    const { vocab, dModel } = target.arch;
    const W = unembedding(target);
    for (const position of tokens.keys()) {
      const p = probs!.subarray(position * vocab, (position + 1) * vocab);
      const likely = [...p.keys()].filter(v => p[v]! > settings.outputThreshold).sort((a, b) => p[b]! - p[a]!);
      leftOut.nodes += Math.max(0, likely.length - settings.outputsPerPosition);
      for (const token of likely.slice(0, settings.outputsPerPosition)) {
        const row = await numbers(tf.tidy(() => tf.slice(W, [token, 0], [1, dModel])));
        const vector = row.map((w, d) => w - meanW![d]!); // logit − mean logit
        const id = targets.length;
        const node = { id, position, output: token, probability: p[token]!, logit: logits![position * vocab + token]! };
        targets.push({ node, wanted: { reader: 'output', position, vector } });
      }
    }
    const aimed = targets.filter((t): t is Required<Target> => t.wanted !== undefined);
    const edges: GraphEdge[][] = [];
    const tick = progress && ((done: number) => progress(done, aimed.length));
    await attribute(
      form,
      aimed.map(t => t.wanted),
      settings.batchPositions,
      (k, incoming) => {
        const { node } = aimed[k]!;
        const t = node.position;
        const sources: [id: number, weight: number][] = [[t, incoming.embedding]];
        for (const [i, { C }] of modules.entries()) {
          const [same, across] = [incoming.same[i], incoming.across[i]];
          for (const [index, id] of (same && alive[i]![t]) ?? []) sources.push([id, same![index]!]);
          for (let s = 0; across && s <= t; s++)
            for (const [index, id] of alive[i]![s]!) sources.push([id, across[s * C + index]!]);
        }
        sources.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
        const rounding = ROUNDING * Math.abs(sources[0]![1]);
        const present = sources.filter(([, weight]) => Math.abs(weight) > rounding);
        const strongest = present.slice(0, settings.incoming);
        const total = (list: typeof sources) => list.reduce((sum, [, weight]) => sum + Math.abs(weight), 0);
        node.share = present.length > 0 ? total(strongest) / total(present) : 1;
        node.incoming = present.length;
        leftOut.edges += present.length - strongest.length;
        edges[node.id] = strongest.map(([id, weight]) => [id, node.id, weight]);
      },
      tick,
    );
    const nodes = targets.map(t => t.node);
    const outputs = nodes.flatMap(n => ('output' in n ? [n.output] : []));
    const strings = tokens.map(id => tokenText(job, id));
    return {
      text: strings.join(''),
      tokens: [...tokens],
      strings,
      nodes,
      edges: edges.flat(),
      leftOut,
      outputStrings: Object.fromEntries(outputs.map(id => [id, tokenText(job, id)])),
    };
  } finally {
    tf.dispose(kept as unknown as tf.NamedTensorMap);
  }
}

export const FLAGS = {
  text: 'string',
  json: 'boolean',
  'viewer-json': 'string',
  'output-threshold': 'string',
  incoming: 'string',
  'nodes-per-position': 'string',
} as const;

/** The held-out rows that the page shows. */
export const passageRows = ({ data: { heldOut } }: LmRun): Int32Array[] => {
  const count = Math.min(8, Math.ceil(1024 / heldOut.seqLen), heldOut.count);
  return Array.from({ length: count }, (_, i) => heldOut.row(i) as Int32Array);
};

/** The command. @returns the exit code */
export async function graph(job: LmRun, flags: Flags): Promise<number> {
  const dir = job.problem.config.out;
  const settings: GraphSettings = {
    ...graphDefaults,
    outputThreshold: numberFlag(flags, 'output-threshold', graphDefaults.outputThreshold, { min: 0, max: 1 }),
    incoming: numberFlag(flags, 'incoming', graphDefaults.incoming, { min: 1, max: 4096, integer: true }),
    nodesPerPosition: numberFlag(flags, 'nodes-per-position', graphDefaults.nodesPerPosition, {
      min: 1,
      max: 1e6,
      integer: true,
    }),
  };
  const { text } = flags;
  if (flags.json && typeof text !== 'string') return refuse('graph --json: takes a --text too');
  if (flags['viewer-json'] !== undefined && typeof text !== 'string')
    return refuse('--viewer-json: takes a --text too');
  if (typeof text === 'string') {
    const made = await promptGraph(job, encode(job, text), settings);
    made.text = text;
    const file = flags['viewer-json'];
    if (typeof file === 'string')
      writeAtomic(file, JSON.stringify(viewerGraph(job.problem, made, path.basename(file, '.json'))));
    if (flags.json) console.log(JSON.stringify(made));
    else {
      saveGraph(dir, settings, made);
      refreshPage(dir, job.problem.modules);
    }
    return 0;
  }
  for (const [i, row] of passageRows(job).entries()) {
    const old = readGraphs(dir, settings)?.graphs.some(g => g.tokens.join() === row.join());
    if (old) continue;
    const started = performance.now();
    const made = await promptGraph(job, [...row], settings);
    saveGraph(dir, settings, made);
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    talk(`graph ${i + 1}: ${made.nodes.length} nodes, ${made.edges.length} edges, ${seconds} s`);
  }
  refreshPage(dir, job.problem.modules);
  console.log(path.join(dir, 'graphs.json'));
  return 0;
}

/** graphs.json, if it is of these components and settings. */
export function readGraphs(dir: string, settings?: GraphSettings): GraphsFile | undefined {
  const file = readStage<GraphsFile>(path.join(dir, 'graphs.json'), componentsHash(dir));
  return !settings || JSON.stringify(file?.settings) === JSON.stringify(settings) ? file : undefined;
}

/** Adds a graph to graphs.json, instead of that of the same tokens. */
function saveGraph(dir: string, settings: GraphSettings, made: PromptGraph): void {
  const old = readGraphs(dir, settings)?.graphs ?? [];
  const graphs = [...old.filter(g => g.tokens.join() !== made.tokens.join()), made];
  const file: GraphsFile = { formatVersion: 1, components: componentsHash(dir), settings, graphs };
  writeAtomic(path.join(dir, 'graphs.json'), JSON.stringify(file));
}
