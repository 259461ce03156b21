import * as fs from 'node:fs';
import * as os from 'node:os';
import { refuse } from './usage-error.ts';

// What a long loop shows on standard error, and how a signal ends it between two steps.

/** Where a terminal's cursor is: behind a live line, which has no newline yet. */
let behindLiveLine = false;

/** Shows a line: on a terminal in place of the live one, and `last` ends it; elsewhere a line like any other. */
export function showLive(line: string, last: boolean): void {
  const live = process.stderr.isTTY === true;
  process.stderr.write(live ? `\r\x1b[K${line}${last ? '\n' : ''}` : `${line}\n`);
  behindLiveLine = live && !last;
}

/** Ends the live line, if there is one: what is said next starts on a line of its own. */
export function endLiveLine(): void {
  if (behindLiveLine) process.stderr.write('\n');
  behindLiveLine = false;
}

/** A long loop's progress: one line that is rewritten on a terminal, a plain line now and then elsewhere. */
export function startProgress(total: number, first = 0, unit = 'step') {
  const started = performance.now();
  const live = process.stderr.isTTY === true;
  let shown = -Infinity;
  return (done: number, text: () => string): void => {
    const now = performance.now();
    if (done !== total && now - shown < (live ? 100 : 10_000)) return;
    shown = now;
    const perStep = (now - started) / Math.max(1, done - first);
    const left = Math.round((perStep * (total - done)) / 1000);
    const time = `${Math.floor(left / 60)}:${String(left % 60).padStart(2, '0')}`;
    showLive(`${text()}  ${perStep.toPrecision(3)} ms/${unit}  ${time} left`, done === total);
  };
}

/**
 * SIGINT and SIGTERM ask the loop to stop after its step. From then on the system handles them, so that a second one
 * ends the process at once, even inside a long native call.
 */
export function watchSignals(say: (line: string) => void) {
  let exitCode: number | undefined;
  const onSignal = (signal: 'SIGINT' | 'SIGTERM') => {
    if (signal === 'SIGINT' && process.stderr.isTTY) behindLiveLine = true; // behind the ^C that a terminal echoes
    endLiveLine();
    if (exitCode) process.exit(exitCode); // two of them came during one native call
    exitCode = 128 + os.constants.signals[signal];
    say(`${signal}: saving after this step; once more stops at once`);
  };
  process.on('SIGINT', onSignal).on('SIGTERM', onSignal);
  const stop = () => void process.off('SIGINT', onSignal).off('SIGTERM', onSignal);
  return {
    /** To be awaited after each step: lets signals in, and gives the exit code (130 or 143) once one has come. */
    async interrupted(): Promise<number | undefined> {
      await new Promise(setImmediate);
      if (!exitCode) return undefined;
      stop();
      endLiveLine(); // of the step that the signal came into
      return exitCode;
    },
    stop,
  };
}

interface DryRun {
  engine: { name: string; picture?(): { name: string; nodes: number; bytes: Uint8Array } };
  problem: { modules: readonly { path: string; dIn: number; dOut: number; C: number }[]; config: { nSteps: number } };
}
/**
 * --dry-run: lists the modules, times a few steps, and with --save-graph writes the recorded step.
 * @throws UsageError if the engine records nothing, or the file can't be written
 */
export async function dryRun(
  { engine, problem: { modules, config } }: DryRun,
  flags: Record<string, unknown>,
  step: (n: number) => Promise<void>,
): Promise<void> {
  const file = flags['save-graph'] as string | undefined;
  const write = (bytes: Uint8Array | string) => {
    const beside = `${file}.tmp-${process.pid}`;
    try {
      if (fs.statSync(`${file}`, { throwIfNoEntry: false })?.isDirectory()) throw new Error('it is a folder');
      fs.writeFileSync(beside, bytes);
      if (bytes.length > 0) fs.renameSync(beside, `${file}`);
      else fs.rmSync(beside);
    } catch (error) {
      refuse(`--save-graph ${file}: cannot be written (${(error as Error).message})`);
    }
  };
  if (file) write(''); // a wrong path is known before minutes have passed
  if (file && !engine.picture)
    refuse(`--save-graph: on ${engine.name} nothing is recorded: --engine onnx or tensorflow`);
  for (const { path, dIn, dOut, C } of modules) console.log(`${path}  [${dOut}, ${dIn}]  C ${C}`);
  const times: number[] = [];
  for (let n = 0; n < 7; n++) {
    const started = performance.now();
    await step(n);
    if (n >= 2) times.push(performance.now() - started); // the first two are traced and checked
  }
  const median = times.sort((a, b) => a - b)[2]!;
  const hours = ((median * config.nSteps) / 3.6e6).toFixed(2);
  console.log(`${median.toFixed(1)} ms per step: ${config.nSteps} steps take ${hours} hours`);
  if (!file) return;
  const { name, nodes, bytes } = engine.picture!();
  write(bytes);
  console.log(`${file}: ${nodes} nodes of ${name.replace(/\(.*/s, '')}, for Netron`);
}

/** Says where a target is not the one that a preset is meant for. */
export function warnOfTarget(arch: object, meantFor: Record<string, number>, say: (line: string) => void): void {
  for (const [field, meant] of Object.entries(meantFor)) {
    const got = (arch as Record<string, unknown>)[field];
    if (got !== meant) say(`warning  this preset is meant for a target with ${field} ${meant}; this one has ${got}`);
  }
}
