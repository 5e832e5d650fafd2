-- Public keys of users that are good at the SSH door without a certificate. The id is made of
-- the key, so that no two users have the same one.
CREATE TABLE ssh_keys (
    id          TEXT   PRIMARY KEY,
    name        TEXT   NOT NULL,
    user_groups TEXT   NOT NULL,
    fingerprint TEXT   NOT NULL,
    public_key  TEXT   NOT NULL,
    remark      TEXT   NOT NULL,
    created     BIGINT NOT NULL,
    created_by  TEXT   NOT NULL
);
CREATE INDEX ssh_keys_name ON ssh_keys (name);

ALTER TABLE meta ADD COLUMN ssh_at BIGINT NOT NULL DEFAULT 0;
