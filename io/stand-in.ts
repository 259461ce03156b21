import * as fs from 'node:fs';
import { orRefuse, refuse } from './usage-error.ts';

// What often lies where a file of a model is expected: downloads and clones that ended with something else.

const DOWNLOAD = 'download the file itself again (a private repository needs a token)';
const PICKLE = 'convert it to safetensors (pickles are never loaded)';
const ERROR = "a server's error message, not the file";
/** By how it starts: as text, or bytes in hexadecimal. */
const STAND_INS: [start: RegExp | string, what: string, todo: string][] = [
  [/^version https:\/\/(git-lfs|hawser)\b/, 'a Git LFS pointer, not the file', 'run "git lfs pull" in its folder'],
  [/^(\.\.\/)*\.git\/annex\/|^\/annex\/objects\//, 'a git-annex pointer, not the file', 'run "git annex get" there'],
  [/^\s*<(!doctype html|html|head|body|!--)/i, 'an HTML page, not the file', DOWNLOAD],
  [/^\s*<(\?xml|Error>)/i, 'an XML answer of a server, not the file', DOWNLOAD],
  [/^\s*\{"error"|^(404: )?([a-z]+ )?not found|^(invalid username|unauthorized|access )/i, ERROR, DOWNLOAD],
  ['504b0304', 'a zipped PyTorch pickle', PICKLE],
  ['8002', 'a PyTorch pickle', PICKLE],
  [/^GGUF/, 'a GGUF file', 'take the safetensors that it was made from'],
  ['1f8b', 'compressed with gzip', 'decompress it'],
];

/** @returns what the file is instead and what to do; undefined if that can't be told from its first bytes */
export function standIn(file: string): string | undefined {
  const head = Buffer.alloc(256);
  const fd = fs.openSync(file, 'r');
  const bytes = fs.readSync(fd, head, 0, head.length, 0);
  fs.closeSync(fd);
  const [text, hex] = (['utf8', 'hex'] as const).map(encoding => head.toString(encoding, 0, bytes)) as [string, string];
  const startsSo = (start: RegExp | string) => (typeof start === 'string' ? hex.startsWith(start) : start.test(text));
  const [, what, todo] = STAND_INS.find(([start]) => startsSo(start)) ?? [];
  return what && `is ${what}: ${todo}`;
}

/** The object in a JSON file. @throws UsageError naming the file, and what lies there instead where that is known */
export function readObject(file: string): Record<string, unknown> {
  const text = orRefuse(file, () => fs.readFileSync(file, 'utf8'));
  const parse = (): unknown => {
    try {
      return JSON.parse(text);
    } catch (error) {
      return refuse(`${file}: ${standIn(file) ?? (error as Error).message}`);
    }
  };
  const value = parse();
  const object = typeof value === 'object' && value && !Array.isArray(value);
  return object ? (value as Record<string, unknown>) : refuse(`${file}: ${standIn(file) ?? 'is not an object'}`);
}
