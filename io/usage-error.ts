/** Wrong input: one line, exit code 2. Known to nano-param-decomp.ts by its name, since engine/ imports nothing of it. */
export class UsageError extends Error {
  override readonly name = 'UsageError';
}
/** Refuses it. Parts of the message may be a stranger's text: one line, no control or direction marks. */
export function refuse(message: string): never {
  throw new UsageError(message.slice(0, 500).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '?'));
}
/** What the job gives; what it throws is a refusal of `where`: a file, or a place in one. */
export function orRefuse<X>(where: string, job: () => X): X {
  try {
    return job();
  } catch (error) {
    return refuse(`${where}: ${(error as Error).message}`);
  }
}
