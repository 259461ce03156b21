import type { Clusters } from './cluster.ts';
import type { Label } from './interpret.ts';

// What the stages write into the run folder, with their settings, and what the page shows of it.

// ---- graphs.json ----

export const graphDefaults = {
  outputThreshold: 0.01, // next tokens with a larger probability are nodes,
  outputsPerPosition: 15, // at most so many a position
  incoming: 16, // edges kept for each node: the strongest
  nodesPerPosition: 256, // components of a position that are nodes: those with the largest importance
  batchPositions: 4096, // of one backward pass: as many copies of the text as fit, each with a target of its own
};
export type GraphSettings = typeof graphDefaults;

/** Its `share`: of Σ|α| over all of its incoming edges, how much those kept are; `incoming`: how many there were. */
export type GraphNode = { id: number; position: number; share?: number; incoming?: number } & (
  | { embedding: number }
  | { module: string; index: number; ci: number; activation: number }
  | { output: number; probability: number; logit: number } // logit minus the mean logit
);
export type GraphEdge = [from: number, to: number, weight: number];
export interface PromptGraph {
  text: string;
  tokens: number[];
  strings: string[]; // the text of each token
  nodes: GraphNode[]; // embeddings, then components, position by position in the network's order, then next tokens
  edges: GraphEdge[]; // by target, the strongest first
  leftOut: { nodes: number; edges: number }; // over the bounds
  outputStrings: Record<number, string>; // the text of every next token
}
/** The content of graphs.json. */
export interface GraphsFile {
  formatVersion: 1;
  components: string; // SHA-256 of components.safetensors
  settings: GraphSettings;
  graphs: PromptGraph[];
}

// ---- attributions.json ----

export const attributionDefaults = {
  positions: 4096, // of training rows
  batchPositions: 1024, // of one pass
  threshold: 1e-6, // targets have a larger mean importance
  strongest: 16, // sources and targets kept for each component
  outputCells: 2 ** 20, // numbers kept of what components write to the residual; more: left out
};
export type AttributionSettings = typeof attributionDefaults;

export type Source = { module: string; index: number } | { token: number };
/** pmi: of firing at the same position, ln(n_ab N / (n_a n_b)); null: never together, or a token. */
export type Strength = { A: number; Aabs: number; normalised: number; pmi: number | null };
/** The content of attributions.json. */
export interface Attributions {
  formatVersion: 1;
  components: string; // SHA-256 of components.safetensors
  settings: AttributionSettings;
  positions: number;
  alive: number; // targets that there are; `targets` are those done so far, the most used first
  complete: boolean;
  targets: { module: string; index: number; sources: (Source & Strength)[]; share: number }[]; // share of Σ|Aabs|
  feeds: { module: string; index: number; targets: ({ module: string; index: number } & Strength)[] }[];
  /** A(c→d) for every coordinate d of the normed residual that the unembedding multiplies; times W_U: of a logit. */
  outputs: { module: string; index: number; A: number[] }[];
  leftOut: string[];
}

// ---- circuits/*.json ----

export const circuitDefaults = {
  steps: 1000, // of Adam
  lr: 0.1,
  coefficient: 0.1, // of the importance
  p: 0.3, // its exponent
  adversarySteps: 4, // sign steps of 1.0 in the loss;
  interventionSteps: 20, // and of 0.1 in the adversarial intervention
  draws: 8, // of the stochastic intervention
  seed: 0,
};
export type CircuitSettings = typeof circuitDefaults;

export type CircuitNode = { position: number; module: string; index: number; ci: number };
/** What the model says at the position under a regime. */
export interface Regime {
  regime: 'target' | 'only these' | 'stochastic' | 'adversarial' | 'without these';
  token: string; // the likeliest next one
  probability: number; // of the wanted token; without one, of the target's likeliest
  kl: number; // KL(target ‖ this), nats
}
/** The content of circuits/*.json. */
export interface Circuit {
  formatVersion: 1;
  components: string; // SHA-256 of components.safetensors
  settings: CircuitSettings;
  text: string;
  tokens: number[];
  position: number; // where the next token is predicted
  token: number | null;
  alive: number; // pairs that could have been in it
  nodes: CircuitNode[];
  interventions: Regime[];
  control: Regime[]; // of as many random alive pairs
}

// ---- edits/*.json ----

/** What an edit does on held-out text. Means over no position are null. */
export interface EditReport {
  positions: number;
  firing: number; // positions where one of the edited components has an importance above 0
  kl: number; // mean KL(unedited ‖ edited) over all, nats
  klFiring: number | null;
  klElsewhere: number | null;
  token?: { id: number; text: string; before: number | null; after: number | null }; // mean probability where it fires
}
/** The content of edits/*.json: an edited folder that was written, and what it does. */
export interface EditFile extends EditReport {
  formatVersion: 1;
  components: string; // SHA-256 of components.safetensors
  folder: string; // as --out named it
  edits: { module: string; index: number; factor: number }[]; // 0: removed
  write: { module: string; index: number; strength: number } | null; // of report.token
}

// ---- The page: clusters.json and interpretations.jsonl ----

/** Groups by the columns of their members, the largest first. */
export interface PageGroups {
  alpha: number;
  tau: number;
  positions: number;
  leaves: number; // components that were grouped
  best: number; // merges after which L is smallest
  L: [groups: number, bits: number][]; // bits a position, at most 200 points
  alphas: Clusters['alphas'];
  list: { columns: number[]; active: number }[];
}
/** Of one component; a score of null could not be read. */
export interface PageLabel extends Label {
  model: string;
  graph?: string; // the label that knows its neighbours
  scores: { kind: string; score: number | null; chance: number; tokenOverlap?: number }[];
}
export interface PageMeanings {
  groups?: PageGroups;
  labels?: Record<number, PageLabel>; // by column
}
