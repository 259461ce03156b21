import type { LanguageModel, Run } from '../nano-param-decomp.ts';

/** A finished run on a language model: what openRun gives, and what the stages work on. */
export type LmRun = Run<LanguageModel>;
