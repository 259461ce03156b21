// What a training step takes, said before anything is allocated.

interface Sizes {
  target: { weights: ReadonlyMap<string, { size: number }> };
  arch: { vocab: number; dModel: number };
  modules: readonly { dIn: number; dOut: number; C: number }[];
  ciShapes: Readonly<Record<string, readonly number[]>>;
  config: Record<
    'ciDModel' | 'ciNBlocks' | 'ciMlpHidden' | 'ciNHeads' | 'seqLen' | 'batchSize' | 'microBatches' | 'ppgdInnerSteps',
    number
  >;
}

const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);

/** Bytes and floating-point operations of a training step. */
export function estimateStep({ target, arch, modules, ciShapes, config }: Sizes) {
  const { vocab, dModel } = arch;
  const { ciDModel, ciNBlocks, ciMlpHidden, ciNHeads, seqLen, batchSize, microBatches: R } = config;
  const sumC = sum(modules.map(m => m.C));
  const N = batchSize * seqLen;
  const targetParams = sum([...target.weights.values()].map(w => w.size));
  const decomposed = sum(modules.map(m => m.dIn * m.dOut));
  const components = sum(modules.map(m => m.C * (m.dIn + m.dOut)));
  const ciFn = sum(Object.values(ciShapes).map(shape => shape.reduce((n, d) => n * d, 1)));
  const params = components + ciFn;
  const state = targetParams + params * (R > 1 ? 4 : 3) + 3 * N * (sumC + modules.length);
  const ciActs = ciNBlocks * (16 * ciDModel + 5 * ciMlpHidden + 4 * ciNHeads * seqLen);
  const acts = 40 * sumC + 12 * vocab + 40 * sum(modules.map(m => m.dIn + m.dOut)) + ciActs; // of a position
  // A forward costs 1, a backward to the masks 1, to V and U 1 more: each inner move takes 2, each of two losses 3.
  const passes = 2 * (config.ppgdInnerSteps + 2) + 1;
  const perPosition = components * (passes + 1) + (decomposed + dModel * vocab) * passes + 3 * ciFn;
  return {
    targetParams,
    components,
    ciFn,
    stateBytes: 4 * state,
    flops: 2 * N * perPosition + 6 * sum(modules.map(m => m.dIn * m.dOut * m.C)),
    bytes: 4 * (state + (N / R) * acts + 3 * params),
  };
}

/** Says what a training step will take, and refuses one that can't fit into the engine's memory. */
export function checkSize(
  sizes: Sizes,
  engine: { memoryBytes?(): number; stateLimit?: number },
  say: (line: string) => void,
): void {
  const { targetParams, components, ciFn, flops, bytes, stateBytes } = estimateStep(sizes);
  const millions = (x: number) => `${(x / 1e6).toFixed(2)}M`;
  const GiB = (x: number) => `${(x / 2 ** 30).toFixed(2)} GiB`;
  const parts = `V and U ${millions(components)}, CI function ${millions(ciFn)}`;
  say(`size     target ${millions(targetParams)} parameters, ${parts}`);
  say(`step     about ${GiB(bytes)} of memory, ${(flops / 1e9).toFixed(1)} GFLOP`);
  const { stateLimit = Number.POSITIVE_INFINITY } = engine;
  if (stateBytes > stateLimit) {
    const message = `the state of a step takes ${GiB(stateBytes)}, and this engine holds ${GiB(stateLimit)}: try --engine tensorflow`;
    throw Object.assign(new Error(message), { name: 'UsageError' });
  }
  const there = engine.memoryBytes?.() ?? Number.POSITIVE_INFINITY;
  if (bytes <= there) return;
  const { batchSize, microBatches: R } = sizes.config;
  const split = batchSize > R && `a larger --micro-batches than ${R}`;
  const advice = `${split || 'a smaller --seq-len or fewer --components'}, or a smaller --batch-size`;
  const message = `a step takes about ${GiB(bytes)} and there are ${GiB(there)}: try ${advice}`;
  throw Object.assign(new Error(message), { name: 'UsageError' });
}
