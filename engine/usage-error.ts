/** Wrong input: one line, exit code 2. Known to nano-param-decomp.ts by its name, since engine/ imports nothing of it. */
export class UsageError extends Error {
  override readonly name = 'UsageError';
}
/** Refuses it. Parts of the message may be a stranger's text: one line, no control or direction marks. */
export function refuse(message: string): never {
  throw new UsageError(message.slice(0, 500).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '?'));
}
