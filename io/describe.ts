// What a run says of itself on standard error.

type Say = (line: string) => void;
interface Rows {
  readonly count: number;
  readonly seqLen: number;
}
interface Described {
  target: { arch: { type: string; nLayers: number; dModel: number; vocab: number }; linears: readonly object[] };
  modules: readonly { C: number }[];
  config: { model: string };
}

/** A line each on the target, the data and the decomposed modules. */
export function describeRun({ target, modules, config }: Described, data: { train: Rows; heldOut: Rows }, say: Say) {
  const { arch, linears } = target;
  const sizes = `${arch.nLayers} layers, width ${arch.dModel}, vocabulary ${arch.vocab}`;
  say(`target   ${config.model}: ${arch.type}, ${sizes}`);
  const rowsOf = ({ count, seqLen }: Rows) => `${count} rows of ${seqLen} tokens`;
  say(`data     ${rowsOf(data.train)} to train on, ${rowsOf(data.heldOut)} held out`);
  const components = modules.reduce((total, { C }) => total + C, 0);
  say(`modules  ${modules.length} of ${linears.length}, ${components} components`);
}

/** The line of progress after a training step: its losses but their total, and L0. */
export function stepLine(done: number, nSteps: number, metrics: Readonly<Record<string, number>>): string {
  const losses = Object.entries(metrics).filter(([name]) => /^loss\/(?!total$)/.test(name));
  const each = losses.map(([name, value]) => `${name.slice('loss/'.length)} ${value.toPrecision(3)}`);
  return `step ${done}/${nSteps}  ${each.join('  ')}  L0 ${metrics['train/l0']!.toFixed(1)}`;
}
