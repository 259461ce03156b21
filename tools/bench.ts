/**
 * Times the same training step here and in PyTorch (bench_torch.py, written the way the original writes it), in turn,
 * on the same machine with the same threads and sizes.
 *
 *   npm run bench                                    all sizes, 2 threads, ONNX Runtime, TensorFlow with and without XLA, WASM at toy
 *   npm run bench -- --sizes toy,stories260K --rounds 5 --steps 30 --threads 2
 *   npm run bench -- --compile                       torch.compile as a peer too (takes a C++ compiler, and minutes)
 *   npm run bench -- --device cuda                   TensorFlow on a GPU in float32, tf32 and bf16 beside PyTorch's bf16 autocast
 *   npm run bench -- --batch 1 --engines tensorflow-bf16-xla --device cuda      other rows in a batch, other engines
 *   PYTHON=/path/to/python npm run bench             the Python that has PyTorch (default python3)
 *
 * Weights and tokens are random: the time of a step does not depend on them. Each number is the median over rounds of
 * the median over steps of a fresh process; "faster" is PyTorch's time over ours. Memory is the process's peak beyond what
 * it took before the model was made; on a GPU what the card gives away beyond what others had of it before. The first
 * calls' check (engine/check.ts) is left out at pile-4L, where it would compare hundreds of gigabytes, and everywhere with
 * --unchecked. Every measurement is told when it is there; a peer that fails leaves no row, and the exit code is 1.
 */
import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import * as tf from '@tensorflow/tfjs';
import { readArchitecture } from '../io/models.ts';
import { PRESETS } from '../io/presets.ts';
import * as nano from '../nano-param-decomp.ts';

interface Result {
  msPerStep: number;
  peakRssBytes: number;
  baseRssBytes: number;
  usedCudaBytes?: number; // of the whole card, at the end: neither library gives any back before
  torch?: string;
  engine?: string;
  note?: string;
}
interface Size {
  target: Record<string, unknown>;
  config: Partial<nano.Config>;
  steps: number;
  engines: string[]; // on a CPU; none: too large for one
  unchecked?: boolean; // the first calls
}
const ON_CUDA = ['tensorflow-float32', 'tensorflow-tf32', 'tensorflow-bf16'];

const simple = (d: number, heads: number, kvHeads: number, mlp: number, vocab: number, layers: number) => ({
  ...{ model_type: 'llama_simple_mlp', hidden_size: d, num_attention_heads: heads, num_key_value_heads: kvHeads },
  ...{ intermediate_size: mlp, vocab_size: vocab, num_hidden_layers: layers, max_position_embeddings: 512 },
});
/** The sizes of bench_torch.py's presets of the same names. */
const SIZES: Record<string, Size> = {
  toy: {
    target: simple(48, 4, 4, 192, 88, 1),
    config: { ...PRESETS.toy!.config, optimizer: 'adamw', seqLen: 32 }, // PyTorch's peer knows no other
    ...{ steps: 60, engines: ['onnx', 'tensorflow', 'tensorflow-xla', 'wasm'] },
  },
  stories260K: {
    target: { ...simple(64, 8, 4, 172, 512, 5), model_type: 'llama', tie_word_embeddings: true },
    config: {
      ...{ components: '*=64', batchSize: 8, seqLen: 64 },
      ...{ ciDModel: 128, ciNBlocks: 2, ciNHeads: 4, ciMlpHidden: 512 },
    },
    ...{ steps: 20, engines: ['onnx', 'tensorflow', 'tensorflow-xla'] },
  },
  'simplestories-2L': {
    target: simple(192, 6, 3, 768, 4019, 2),
    config: { ...PRESETS['simplestories-2L']!.config, batchSize: 4, seqLen: 128 },
    ...{ steps: 8, engines: ['onnx', 'tensorflow', 'tensorflow-xla'] },
  },
  'pile-4L': {
    target: simple(768, 6, 6, 3072, 50277, 4),
    config: { ...PRESETS['pile-4L']!.config, batchSize: 4, seqLen: 512 },
    ...{ steps: 5, engines: [], unchecked: true },
  },
  'pile-4L-block': {
    target: simple(768, 6, 6, 3072, 50277, 1),
    config: { ...PRESETS['pile-4L']!.config, ciNBlocks: 1, batchSize: 1, seqLen: 128 },
    ...{ steps: 3, engines: ['onnx', 'tensorflow', 'tensorflow-xla'] },
  },
};

/** A target of the given architecture with random weights. */
function randomTarget(config: Record<string, unknown>) {
  const arch = readArchitecture(config, 'bench', nano.NAMES);
  const linears = nano.linearLayers(arch);
  const weights = new Map<string, tf.Variable>();
  const random = (name: string, shape: number[], deviation: number) =>
    weights.set(
      name,
      tf.tidy(() => tf.variable(tf.randomNormal(shape, 0, deviation), false)),
    );
  const ones = (name: string) =>
    weights.set(
      name,
      tf.tidy(() => tf.variable(tf.ones([arch.dModel]), false)),
    );
  random(`${arch.names.embed}.weight`, [arch.vocab, arch.dModel], 0.1);
  for (const { path, dIn, dOut } of linears) random(path, [dIn, dOut], 1 / Math.sqrt(dIn));
  for (let i = 0; i < arch.nLayers; i++) {
    for (const part of ['norm1', 'norm2'] as const) ones(`${arch.names.blocks}.${i}.${arch.names[part]}.weight`);
  }
  ones(`${arch.names.last}.weight`);
  return nano.languageModel({ arch, linears, weights });
}

/** One process's measurement: the median time of a step. */
async function measure(name: string, engineName: string, steps: number, threads: number): Promise<Result> {
  const { target: targetConfig, config: differences, unchecked } = SIZES[name]!;
  const [engineKind = '', ...variants] = engineName.split('-');
  const precision = variants.find(x => x !== 'xla');
  const cuda = precision !== undefined;
  const config: nano.Config = {
    ...{ ...nano.DEFAULTS, ...differences, nSteps: 1000, evalBatchSize: 1, engine: engineKind },
    ...{ xla: variants.includes('xla') ? 'on' : 'off', precision: precision ?? 'auto', threads: cuda ? 0 : threads },
    ...(batch && { batchSize: batch }),
  };
  const engine = await nano.startEngine({ ...config, ...{ verify: !unchecked && !flags.unchecked } });
  if (cuda && !engine.gpu) nano.refuse(`--device cuda: ${engine.description}: no GPU (npm run tensorflow -- --gpu)`);
  const baseRssBytes = process.resourceUsage().maxRSS * 1024;
  const target = randomTarget(targetConfig);
  const problem = { target, modules: nano.chooseModules(target.linears, config.components), config };
  const step = nano.compileStep(engine, problem, nano.initialState(problem, nano.initialParams(problem)));
  const ids = Int32Array.from({ length: 64 * config.seqLen }, (_, i) => (i * 7919) % target.arch.vocab);
  const row = (i: number) => ids.subarray(i * config.seqLen, (i + 1) * config.seqLen);
  const rows = { count: 64, seqLen: config.seqLen, row };
  const times: number[] = [];
  const warmup = 3; // the first is traced, the second checked, and XLA compiles
  for (let n = 0; n < warmup + steps; n++) {
    const started = performance.now();
    await step(n, rows);
    if (n >= warmup) times.push(performance.now() - started);
  }
  const peakRssBytes = process.resourceUsage().maxRSS * 1024;
  const ofCard = cuda ? { usedCudaBytes: usedCudaBytes() } : {};
  return { msPerStep: median(times), peakRssBytes, baseRssBytes, engine: engine.description, ...ofCard };
}

/** Of all processes, on the first GPU. @throws UsageError where there is none */
function usedCudaBytes(): number {
  const { stdout } = spawnSync('nvidia-smi', ['--query-gpu=memory.used', '--format=csv,noheader,nounits']);
  const MiB = Number.parseInt(`${stdout}`, 10);
  if (!Number.isFinite(MiB)) nano.refuse('--device cuda: no NVIDIA GPU here (nvidia-smi finds none)');
  return MiB * 2 ** 20;
}

function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return (sorted[Math.floor((sorted.length - 1) / 2)]! + sorted[Math.ceil((sorted.length - 1) / 2)]!) / 2;
}

const inMiB = (bytes: number) => `${(bytes / 2 ** 20).toFixed(0)} MiB`;

/** What `command` measured; without PyTorch there is nothing to compare with, any other peer may fail. */
function attempt(peer: string, command: [string, string[]]): Result | undefined {
  try {
    return run(...command);
  } catch (error) {
    if (peer === 'torch') throw error;
    process.stderr.write(`${peer} did not run: ${(error as Error).message}\n`);
    process.exitCode = 1;
    return undefined;
  }
}

/** The JSON line that a process prints last. */
function run(command: string, args: string[]): Result {
  const { stdout, stderr, status, error } = spawnSync(command, args, { encoding: 'utf8', maxBuffer: 1 << 28 });
  const line = stdout?.trim().split('\n').at(-1) ?? '';
  if (status !== 0 || !line.startsWith('{')) {
    throw new Error(`${command} ${args[0]}: ${error?.message ?? stderr.trim().split('\n').at(-1)}`);
  }
  return JSON.parse(line);
}

const { values: flags } = parseArgs({
  options: {
    sizes: { type: 'string' },
    engines: { type: 'string' },
    batch: { type: 'string', default: '0' },
    unchecked: { type: 'boolean', default: false },
    rounds: { type: 'string', default: '3' },
    steps: { type: 'string', default: '0' },
    threads: { type: 'string', default: '2' },
    device: { type: 'string', default: 'cpu' },
    compile: { type: 'boolean', default: false },
    child: { type: 'string' },
  },
});
const threads = Number(flags.threads);
const batch = Number(flags.batch);
const cuda = flags.device === 'cuda';
/** Runs all and prints the table. @throws Error with one line */
function bench(): void {
  if (!['cpu', 'cuda'].includes(flags.device)) nano.refuse(`--device: got ${flags.device}, takes cpu or cuda`);
  if (!Number.isInteger(batch) || batch < 0) nano.refuse(`--batch: got ${flags.batch}, takes a number of rows`);
  const unknown = flags.engines
    ?.split(',')
    .find(x => !/^(onnx|wasm|tensorflow(-float32|-tf32|-bf16)?(-xla)?)$/.test(x));
  if (unknown) nano.refuse(`--engines: got ${unknown}, takes onnx, wasm, tensorflow[-float32|-tf32|-bf16][-xla]`);
  if (cuda) usedCudaBytes();
  const here = (file: string) => fileURLToPath(new URL(file, import.meta.url));
  const python = process.env.PYTHON ?? 'python3';
  const lines = ['| size | engine | ms/step | PyTorch | faster | memory | PyTorch |', '|---|---|---|---|---|---|---|'];
  const all = Object.keys(SIZES).filter(name => cuda || SIZES[name]!.engines.length > 0);
  for (const name of flags.sizes?.split(',') ?? all) {
    const size = SIZES[name];
    if (!size || !all.includes(name)) nano.refuse(`--sizes: got ${name}, takes ${all.join(', ')}`);
    const steps = flags.steps === '0' ? String(size.steps) : flags.steps;
    const common = ['--steps', steps, '--threads', flags.threads, ...(batch ? ['--batch', flags.batch] : [])];
    const torchArgs = [here('bench_torch.py'), '--preset', name, ...common, '--device', flags.device];
    const commands: Record<string, [string, string[]]> = {
      torch: [python, [...torchArgs, ...(cuda ? ['--autocast'] : [])]],
      ...(flags.compile ? { 'torch.compile': [python, [...torchArgs, '--compile']] } : {}),
    };
    const engines = flags.engines?.split(',') ?? (cuda ? ON_CUDA : size.engines);
    const unchecked = flags.unchecked ? ['--unchecked'] : [];
    for (const engine of engines) {
      const args = [...process.execArgv, here('bench.ts'), '--child', engine, '--sizes', name, ...common, ...unchecked];
      commands[engine] = [process.execPath, args];
    }
    const results: Record<string, (Result & { memory: number })[]> = {};
    for (let round = 0; round < Number(flags.rounds); round++)
      for (const [peer, command] of Object.entries(commands)) {
        const before = cuda ? usedCudaBytes() : 0;
        const result = attempt(peer, command);
        if (!result) continue;
        const memory = cuda ? result.usedCudaBytes! - before : result.peakRssBytes - result.baseRssBytes;
        process.stderr.write(`${name} ${peer}: ${result.msPerStep.toFixed(1)} ms, ${inMiB(memory)}\n`);
        results[peer] = [...(results[peer] ?? []), { ...result, memory }];
      }
    const of = (peer: string) => {
      const memory = Math.max(...results[peer]!.map(r => r.memory));
      return { ms: median(results[peer]!.map(r => r.msPerStep)), memory: inMiB(memory) };
    };
    const torch = of('torch');
    for (const engine of Object.keys(results).filter(peer => peer !== 'torch')) {
      const ours = of(engine);
      const faster = `${(torch.ms / ours.ms).toFixed(2)}x`;
      const cells = [name, engine, ours.ms.toFixed(1), torch.ms.toFixed(1), faster, ours.memory, torch.memory];
      lines.push(`| ${cells.join(' | ')} |`);
    }
    lines[0] = lines[0]!.replace(/PyTorch \|/, `PyTorch ${results.torch![0]!.torch}${cuda ? ', bf16' : ''} |`);
  }
  console.log(lines.join('\n'));
}

try {
  if (flags.child) {
    console.log(JSON.stringify(await measure(flags.sizes!, flags.child, Number(flags.steps), threads)));
  } else bench();
} catch (error) {
  console.error(`bench: ${(error as Error).message}`);
  process.exitCode = (error as Error).name === 'UsageError' ? 2 : 1;
}
