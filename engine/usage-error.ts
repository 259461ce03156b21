/** Wrong input: one line, exit code 2. Known to nano-param-decomp.ts by its name, since engine/ imports nothing of it. */
export class UsageError extends Error {
  override readonly name = 'UsageError';
}
