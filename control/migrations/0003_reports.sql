-- Which report a shard's lease comes from: when its process started, in milliseconds since 1970, and the how-many-th of
-- that process. Reports reach the row by every replica, and an older one may come later.
ALTER TABLE shards ADD COLUMN started BIGINT NOT NULL DEFAULT 0;
ALTER TABLE shards ADD COLUMN reports BIGINT NOT NULL DEFAULT 0;
