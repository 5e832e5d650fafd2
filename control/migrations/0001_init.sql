-- The database of control: one text for SQLite and PostgreSQL. Whole numbers are BIGINT, times are seconds since 1970,
-- yes and no are 1 and 0.

-- One row. Every transaction that writes locks it first, so that writers come one after the other and revisions are
-- committed in their order. Each *_at is the revision at which that section of the watch changed last.
CREATE TABLE meta (
    id           BIGINT PRIMARY KEY CHECK (id = 1),
    trust_domain TEXT   NOT NULL,
    ca           TEXT   NOT NULL,
    revision     BIGINT NOT NULL,
    policy_at    BIGINT NOT NULL,
    revoked_at   BIGINT NOT NULL,
    access_at    BIGINT NOT NULL,
    edges_at     BIGINT NOT NULL
);

-- Rights to enrol, and access tokens (uses_left is NULL then). The text of a token is kept as a hash only.
CREATE TABLE tokens (
    id          TEXT   PRIMARY KEY,
    sha256      TEXT   NOT NULL,
    kind        TEXT   NOT NULL,
    name        TEXT,
    uses_left   BIGINT,
    expires     BIGINT NOT NULL,
    user_groups TEXT   NOT NULL,
    site        TEXT,
    replaces    BIGINT NOT NULL,
    created_by  TEXT   NOT NULL,
    created     BIGINT NOT NULL
);
CREATE INDEX tokens_expires ON tokens (expires);

-- Enrolled machines. Where they are connected is never kept here.
CREATE TABLE edges (
    name       TEXT   PRIMARY KEY,
    site       TEXT,
    enrolled   BIGINT NOT NULL,
    not_after  BIGINT NOT NULL,
    revoked_at BIGINT,
    last_seen  BIGINT
);

-- Every certificate that was issued and has not ended long ago.
CREATE TABLE certificates (
    serial     TEXT   PRIMARY KEY,
    role       TEXT   NOT NULL,
    name       TEXT   NOT NULL,
    issued     BIGINT NOT NULL,
    not_after  BIGINT NOT NULL,
    revoked_at BIGINT
);
CREATE INDEX certificates_holder ON certificates (role, name);
CREATE INDEX certificates_not_after ON certificates (not_after);

-- The policy; each rule as JSON.
CREATE TABLE rules (
    name TEXT PRIMARY KEY,
    rule TEXT NOT NULL
);

-- Shards that live, for other replicas of control and for its own next start. A beat that moves is a sign of life, so
-- that replicas need not agree on the time.
CREATE TABLE shards (
    name      TEXT   PRIMARY KEY,
    addresses TEXT   NOT NULL,
    version   TEXT   NOT NULL,
    edges     BIGINT NOT NULL,
    last_seen BIGINT NOT NULL,
    beat      BIGINT NOT NULL
);
