import * as os from 'node:os';

// What a long loop shows on standard error, and how a signal ends it between two steps.

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
    const line = `${text()}  ${perStep.toPrecision(3)} ms/${unit}  ${time} left`;
    process.stderr.write(live ? `\r\x1b[K${line}${done === total ? '\n' : ''}` : `${line}\n`);
  };
}

/**
 * SIGINT and SIGTERM ask the loop to stop after its step. From then on the system handles them, so that a second one
 * ends the process at once, even inside a long native call.
 */
export function watchSignals(say: (line: string) => void) {
  let exitCode: number | undefined;
  const onSignal = (signal: 'SIGINT' | 'SIGTERM') => {
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
      if (exitCode) stop();
      return exitCode;
    },
    stop,
  };
}

/** --dry-run: lists the modules and times a few steps. */
export async function dryRun(
  {
    modules,
    config,
  }: { modules: readonly { path: string; dIn: number; dOut: number; C: number }[]; config: { nSteps: number } },
  step: (n: number) => Promise<void>,
): Promise<void> {
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
}
