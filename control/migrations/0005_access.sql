-- Access records, one for each stream that ended, as shards sent them. The number is the order in which they came here,
-- which is what readers page and follow by; at_ms is when the stream ended, by its shard's clock. A shard numbers its
-- records within each of its processes, so that a batch that is sent twice is kept once.
CREATE TABLE access (
    number  BIGINT PRIMARY KEY,
    at_ms   BIGINT NOT NULL,
    shard   TEXT   NOT NULL,
    started BIGINT NOT NULL,
    seq     BIGINT NOT NULL,
    who     TEXT   NOT NULL,
    edge    TEXT   NOT NULL,
    outcome TEXT   NOT NULL,
    code    TEXT   NOT NULL,
    record  TEXT   NOT NULL
);
CREATE UNIQUE INDEX access_origin ON access (shard, started, seq);
CREATE INDEX access_at ON access (at_ms);
CREATE INDEX access_who ON access (who, number);
CREATE INDEX access_edge ON access (edge, number);

-- The number of the last record, and how many shards had no room for. Locked by whoever writes records, so that numbers
-- become visible in their order.
CREATE TABLE access_state (
    id   BIGINT PRIMARY KEY CHECK (id = 1),
    last BIGINT NOT NULL,
    lost BIGINT NOT NULL
);
INSERT INTO access_state (id, last, lost) VALUES (1, 0, 0);
