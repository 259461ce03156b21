/**
 * What keeps a long run safe: two files that are only ever replaced together, and signals that stop it between steps.
 *
 * A checkpoint is a pair: components.safetensors, and the state.safetensors whose metadata names the step and the
 * SHA-256 of the components that it belongs to. Files under these names are only ever replaced by renames, and before
 * the first of the two renames the old pair has got second names (*.previous). So whenever a save is cut off, a state
 * is there beside its own components: both old, or both new.
 */
import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as os from 'node:os';
import * as path from 'node:path';
import { UsageError } from './usage-error.ts';

const PAIR = ['state', 'components'] as const; // in this order: where components are, a checkpoint is
const pairFile = (dir: string, what: (typeof PAIR)[number], which: '' | '.next' | '.previous' = '') =>
  path.join(dir, `${what}${which}.safetensors`);

export interface Pair {
  step: number;
  components: string; // paths
  state: string;
  /** says so when it is not the pair last written */
  warning?: string;
}
type Metadata = ReadonlyMap<string, string>;

/** For files, and for folders after a rename, which only then survives a power cut. (Windows has no such call.) */
function syncToDisk(fileOrFolder: string): void {
  if (process.platform === 'win32') return;
  const fd = fs.openSync(fileOrFolder, 'r');
  fs.fsyncSync(fd);
  fs.closeSync(fd);
}

function sha256(file: string): string {
  const hash = crypto.createHash('sha256');
  const piece = Buffer.alloc(2 ** 22);
  const fd = fs.openSync(file, 'r');
  try {
    for (let n = fs.readSync(fd, piece); n > 0; n = fs.readSync(fd, piece)) hash.update(piece.subarray(0, n));
  } finally {
    fs.closeSync(fd);
  }
  return hash.digest('hex');
}

/** The two files as a pair, unless one is missing or broken or the state belongs to other components. */
async function fittingPair(
  components: string,
  state: string,
  readMetadata: (file: string) => Promise<Metadata>,
): Promise<Pair | undefined> {
  try {
    const metadata = await readMetadata(state);
    if (metadata.get('components') !== sha256(components)) return undefined;
    return { step: Number(metadata.get('step')), components, state };
  } catch (error) {
    const { name, code } = error as NodeJS.ErrnoException;
    if (name === 'UsageError' || code === 'ENOENT') return undefined;
    throw error;
  }
}

/**
 * Saves both files as one checkpoint. Each writer writes a file of the given name whole and on disk, the first returns
 * its SHA-256. If this throws or is killed, the last checkpoint can still be loaded.
 */
export async function savePair(
  dir: string,
  writeComponents: (file: string) => Promise<string>,
  writeState: (file: string, componentsSha256: string) => Promise<unknown>,
  readMetadata: (file: string) => Promise<Metadata>,
): Promise<void> {
  const rename = (from: string, to: string) => {
    fs.renameSync(from, to);
    syncToDisk(dir);
  };
  const removeUnfinished = () => {
    for (const name of fs.readdirSync(dir))
      if (/^(components|state)\.(next|.*\.tmp-\d+$)/.test(name)) fs.rmSync(path.join(dir, name), { force: true });
  };
  removeUnfinished(); // of a process that was killed
  try {
    const hash = await writeComponents(pairFile(dir, 'components', '.next'));
    syncToDisk(dir);
    await writeState(pairFile(dir, 'state', '.next'), hash);
    syncToDisk(dir);
  } catch (error) {
    removeUnfinished();
    throw error;
  }
  // Two files that don't fit were left by a save cut off between the renames below: the previous pair is then the good one.
  if (await fittingPair(pairFile(dir, 'components'), pairFile(dir, 'state'), readMetadata))
    for (const what of PAIR) {
      const secondName = `${pairFile(dir, what, '.previous')}.tmp-${process.pid}`;
      try {
        fs.linkSync(pairFile(dir, what), secondName);
      } catch {
        fs.copyFileSync(pairFile(dir, what), secondName); // a file system without hard links
        syncToDisk(secondName);
      }
      rename(secondName, pairFile(dir, what, '.previous'));
    }
  for (const what of PAIR) rename(pairFile(dir, what, '.next'), pairFile(dir, what));
}

/** The last checkpoint that is whole; undefined before the first. @throws UsageError if none of several is whole */
export async function loadPair(
  dir: string,
  readMetadata: (file: string) => Promise<Metadata>,
): Promise<Pair | undefined> {
  const some = (['', '.previous'] as const).some(which => fs.existsSync(pairFile(dir, 'components', which)));
  if (!some) return;
  for (const stateOf of ['', '.previous'] as const)
    for (const componentsOf of ['', '.previous'] as const) {
      const files = [pairFile(dir, 'components', componentsOf), pairFile(dir, 'state', stateOf)] as const;
      const pair = await fittingPair(...files, readMetadata);
      if (pair && !stateOf && !componentsOf) return pair;
      if (pair) return { ...pair, warning: `${dir}: the last save was cut off; going on from step ${pair.step}` };
    }
  throw new UsageError(
    `${dir}: state.safetensors and components.safetensors are broken or not of the same save, the previous ones too`,
  );
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
  const stop = () => process.off('SIGINT', onSignal).off('SIGTERM', onSignal);
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
