/** Prints the SHA-256 by which a run's config.json knows its target: npx tsx tools/target-sha.ts FOLDER */
import { loadTarget } from '../nano-param-decomp.ts';

const target = await loadTarget(process.argv[2] ?? '');
console.log(JSON.stringify({ type: target.arch.type, sha256: target.source.sha256, context: target.arch.context }));
