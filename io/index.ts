// What stands between nano-param-decomp.ts and the world: flags, the hub, models and tokenizers of many families, data
// files, safetensors, checkpoints, the console. This folder imports nothing from the file, types included: it declares
// the few fields that it needs, and TypeScript compares the structures where the file takes the folder in.
export * from './checkpoints.ts';
export * from './console.ts';
export { rowsOf } from './data.ts';
export { describeRun, stepLine } from './describe.ts';
export { commandLine } from './flags.ts';
export { datasetCommit, resolveModel } from './hub.ts';
export { openModel } from './models.ts';
export { PRESETS } from './presets.ts';
export { readRecord, runRecord } from './record.ts';
export { tokenizerOf as loadTokenizer } from './tokenizer.ts';
