-- The ring and who may change it: the replica that leads, whose beat is its sign of life. Epochs only grow.
CREATE TABLE ring (
    id      BIGINT PRIMARY KEY CHECK (id = 1),
    epoch   BIGINT NOT NULL,
    members TEXT   NOT NULL,
    leader  TEXT   NOT NULL,
    beat    BIGINT NOT NULL
);
INSERT INTO ring (id, epoch, members, leader, beat) VALUES (1, 0, '[]', '', 0);

-- What administrators want of shards. A shard that is to serve has no row.
CREATE TABLE shard_orders (
    name      TEXT   PRIMARY KEY,
    ordered   TEXT   NOT NULL,
    given_by  TEXT   NOT NULL,
    given_at  BIGINT NOT NULL
);

ALTER TABLE shards ADD COLUMN state   TEXT   NOT NULL DEFAULT 'serving';
ALTER TABLE shards ADD COLUMN weight  BIGINT NOT NULL DEFAULT 100;
ALTER TABLE shards ADD COLUMN epoch   BIGINT NOT NULL DEFAULT 0;
ALTER TABLE shards ADD COLUMN streams BIGINT NOT NULL DEFAULT 0;
