// What a training step takes, said before anything is allocated.

interface Sizes {
  target: { weights: ReadonlyMap<string, { size: number }> };
  arch: { vocab: number; dModel: number };
  modules: readonly { dIn: number; dOut: number; C: number }[];
  ciShapes: Readonly<Record<string, readonly number[]>>;
  config: Record<
    'ciDModel' | 'ciNBlocks' | 'ciMlpHidden' | 'ciNHeads' | 'seqLen' | 'batchSize' | 'microBatches' | 'ppgdInnerSteps',
    number
  > & { optimizer?: string };
}

const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);

/** Operations of Muon's five Newton-Schulz steps: two products of 2 r²c each and one of 2 r³, r the smaller side. */
const newtonSchulz = (a: number, b: number): number =>
  5 * 2 * Math.min(a, b) ** 2 * (2 * Math.max(a, b) + Math.min(a, b));

/** A running engine, as far as its use of memory goes. */
interface Place {
  name?: string;
  gpu?: boolean;
  xla?: boolean;
  memoryBytes?(): number;
  heapLimit?: number;
}
type Bytes = Record<'state' | 'moved' | 'acts' | 'params', number>;
const MiB = 2 ** 20;
/**
 * The peak of a process, by engine: Node, the libraries and the graph (M modules), and what it holds of the state, of what
 * moves of it, of the activations of a batch or shard, and of values as large as all parameters. Measured at the toy,
 * stories260K and simplestories-2L.
 */
const PEAKS: Record<string, (M: number, bytes: Bytes, available: number) => number> = {
  onnx: (M, b) => (330 + 5 * M) * MiB + b.state + 2.5 * b.moved + 0.12 * b.acts,
  tensorflow: (_, b) => 565 * MiB + b.state + 2 * b.moved + 0.55 * b.acts + b.params,
  xla: (M, b) => (860 + 27 * M) * MiB + b.state + 2 * b.moved + 0.2 * b.acts, // compiling takes most
  wasm: (_, b) => 245 * MiB + b.state + b.acts + 3 * b.params,
  // what the card gives away, at pile-4L too, on an H100: TensorFlow takes regions that double as long as the card has them
  cuda(_, b, available) {
    const needed = b.state + 0.31 * b.acts + 3.5 * b.params;
    const doubled = 2 ** Math.ceil(Math.log2(needed));
    return 640 * MiB + (640 * MiB + doubled <= available ? doubled : needed);
  },
};

/** Bytes and floating-point operations of a training step. */
export function estimateStep({ target, arch, modules, ciShapes, config }: Sizes, place: Place = {}) {
  const { vocab, dModel } = arch;
  const { ciDModel, ciNBlocks, ciMlpHidden, ciNHeads, seqLen, batchSize, microBatches: R } = config;
  const sumC = sum(modules.map(m => m.C));
  const N = batchSize * seqLen;
  const targetParams = sum([...target.weights.values()].map(w => w.size));
  const decomposed = sum(modules.map(m => m.dIn * m.dOut));
  const components = sum(modules.map(m => m.C * (m.dIn + m.dOut)));
  const ciFn = sum(Object.values(ciShapes).map(shape => shape.reduce((n, d) => n * d, 1)));
  const params = components + ciFn;
  const moved = params * (R > 1 ? 4 : 3) + 3 * N * (sumC + modules.length);
  const state = targetParams + moved;
  const ciActs = ciNBlocks * (16 * ciDModel + 5 * ciMlpHidden + 4 * ciNHeads * seqLen);
  const acts = 40 * sumC + 12 * vocab + 40 * sum(modules.map(m => m.dIn + m.dOut)) + ciActs; // of a position
  // A forward costs 1, a backward to the masks 1, to V and U 1 more: each inner move takes 2, each of two losses 3.
  const passes = 2 * (config.ppgdInnerSteps + 2) + 1;
  const perPosition = components * (passes + 1) + (decomposed + dModel * vocab) * passes + 3 * ciFn;
  const ofComponents = modules.map(m => newtonSchulz(m.dIn, m.C) + newtonSchulz(m.C, m.dOut));
  const ofCiFn = Object.values(ciShapes).map(([a = 0, b = 0]) => newtonSchulz(a, b)); // of a vector 0
  const muon = config.optimizer === 'muon' ? sum([...ofComponents, ...ofCiFn]) : 0;
  const bytes = { state: 4 * state, moved: 4 * moved, acts: (4 * N * acts) / R, params: 4 * params };
  const cuda = place.gpu && place.name === 'tensorflow';
  const peak = PEAKS[cuda ? 'cuda' : place.xla ? 'xla' : (place.name ?? '')];
  return {
    targetParams,
    components,
    ciFn,
    heapBytes: bytes.state + 5 * bytes.params, // the state, and a large node while the first call is checked
    flops: 2 * N * perPosition + 6 * sum(modules.map(m => m.dIn * m.dOut * m.C)) + muon,
    bytes:
      peak?.(modules.length, bytes, place.memoryBytes?.() ?? Infinity) ?? bytes.state + bytes.acts + 3 * bytes.params,
  };
}

/** Says what a training step will take, and refuses one that can't fit into the engine's memory. */
export function checkSize(sizes: Sizes, engine: Place, say: (line: string) => void): void {
  const { targetParams, components, ciFn, flops, bytes, heapBytes } = estimateStep(sizes, engine);
  const millions = (x: number) => `${(x / 1e6).toFixed(2)}M`;
  const GiB = (x: number) => `${(x / 2 ** 30).toFixed(2)} GiB`;
  const parts = `V and U ${millions(components)}, CI function ${millions(ciFn)}`;
  say(`size     target ${millions(targetParams)} parameters, ${parts}`);
  say(`step     about ${GiB(bytes)} of memory, ${(flops / 1e9).toFixed(1)} GFLOP`);
  const { heapLimit = Infinity } = engine;
  if (heapBytes > heapLimit) {
    const message = `the state and its check take ${GiB(heapBytes)}, and this engine holds ${GiB(heapLimit)}: try --engine tensorflow`;
    throw Object.assign(new Error(message), { name: 'UsageError' });
  }
  const there = engine.memoryBytes?.() ?? Infinity;
  if (bytes <= there) return;
  const { batchSize, microBatches: R } = sizes.config;
  const split = batchSize > R && `a larger --micro-batches than ${R}`;
  const advice = `${split || 'a smaller --seq-len or fewer --components'}, or a smaller --batch-size`;
  const message = `a step takes about ${GiB(bytes)} and there are ${GiB(there)}: try ${advice}`;
  throw Object.assign(new Error(message), { name: 'UsageError' });
}
