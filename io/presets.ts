import { fileURLToPath } from 'node:url';

const bundled = (file: string) => fileURLToPath(new URL(`../assets/toy/${file}`, import.meta.url));

type Settings = Record<string, string | number | boolean>;
/** What sizes may follow of a target. */
export interface Sized {
  arch: { dModel: number };
  linears: readonly { path: string; dIn: number; dOut: number }[];
}
/** Named settings: their source, what differs from the defaults, and the target that they are meant for. */
export interface Preset {
  source: string;
  target?: Record<string, number>;
  config: Settings;
  /** Settings that follow from the target's sizes, once it is loaded. */
  sizes?: (target: Sized) => Settings;
}

/**
 * Components for each matrix: the mean of its two sides, at most twice its rank, in steps of 8. So a square matrix gets its
 * rank, one of an MLP nearly twice that, and none less: with C below the rank faithfulness can't reach 0. A number in a
 * path (the block's) becomes *, where that leaves one size for all.
 */
export function componentsByRank(linears: Sized['linears']): string {
  const sizeOf = ({ dIn, dOut }: Sized['linears'][number]) =>
    8 * Math.ceil(Math.min((dIn + dOut) / 2, 2 * dIn, 2 * dOut) / 8);
  const kindOf = (path: string) => path.replace(/(?<=^|\.)\d+(?=\.|$)/g, '*');
  const sizes = new Map<string, Set<number>>();
  for (const linear of linears) {
    const kind = kindOf(linear.path);
    sizes.set(kind, (sizes.get(kind) ?? new Set()).add(sizeOf(linear)));
  }
  const rules = linears.map(linear => {
    const kind = kindOf(linear.path);
    return `${sizes.get(kind)!.size === 1 ? kind : linear.path}=${sizeOf(linear)}`;
  });
  return [...new Set(rules)].join(',');
}
// biome-ignore format: kept on few lines
export const PRESETS: Readonly<Record<string, Preset>> = {
  toy: {
    source: 'ours: the bundled one-layer target with known rules',
    config: {
      model: bundled(''), data: bundled('corpus.txt'), evalData: bundled('eval.json'), labels: bundled('labels.json'),
      components: '*.attn.*=48,*.mlp.*=128', seqLen: 32, batchSize: 16, nSteps: 1500, mainLr: 7e-3, optimizer: 'muon',
      coeffFaith: 1e4, coeffImp: 5e-4, impBeta: 4, ppgdLr: 0.05, seed: 0,
      faithfulnessWarmupLr: 5e-3, faithfulnessWarmupLrFinalFrac: 0.05,
      ciDModel: 64, ciNBlocks: 1, ciNHeads: 4, ciMlpHidden: 256,
      evalFreq: 1000, slowEvalFreq: 0, evalBatchSize: 128, saveEvery: 1000,
    },
  },
  'small-lm': {
    source: 'ours: language models of 0.1 to 10 million parameters on one machine; sizes follow the target',
    config: {
      nSteps: 20_000, batchSize: 4, mainLr: 3e-3, gradClipCi: 1,
      coeffFaith: 1e5, coeffImp: 9e-4, impBeta: 0.5, ppgdLr: 0.02, pStart: 1,
      faithfulnessWarmupLr: 5e-3, faithfulnessWarmupLrFinalFrac: 0.05,
      ciNBlocks: 2, ciNHeads: 4, evalFreq: 1000, slowEvalFreq: 0, evalBatchSize: 32, saveEvery: 500,
    },
    sizes: ({ arch, linears }) => {
      const ciDModel = Math.max(64, 8 * Math.ceil((1.5 * arch.dModel) / 8));
      return { components: componentsByRank(linears), seqLen: 64, ciDModel, ciMlpHidden: 4 * ciDModel };
    },
  },
  'simplestories-2L': {
    source: "the original's small public preset for its 2-layer SimpleStories target",
    target: { nLayers: 2, dModel: 192, nHeads: 6, vocab: 4019 },
    config: {
      components: '*.q_proj=288,*.k_proj=288,*.v_proj=384,*.o_proj=480,*.c_fc=1152,*.down_proj=960',
      ciDModel: 512, ciNBlocks: 4, ciNHeads: 8, ciMlpHidden: 2048, coeffImp: 1e-3, mainLr: 3e-4,
    },
  },
  'pile-4L': {
    source: "the paper's run on its 4-layer Pile target, 400k steps of 64 x 512 tokens",
    target: { nLayers: 4, dModel: 768, nHeads: 6, dMlp: 3072, vocab: 50_277 },
    config: {
      components: '*.q_proj=512,*.k_proj=512,*.v_proj=1024,*.o_proj=1024,*.c_fc=3072,*.down_proj=3584',
      batchSize: 64, seqLen: 512, ciDModel: 2048, ciNBlocks: 8, ciNHeads: 16, ciMlpHidden: 8192,
    },
  },
};
