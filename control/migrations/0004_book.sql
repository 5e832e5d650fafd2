-- The address book of the Kubernetes cluster, as the leader read it last, for a start while kube-apiserver is away. The
-- name says what it is: node/NAME, pod/NAMESPACE/NAME or service/NAMESPACE/NAME.
CREATE TABLE book (
    name  TEXT PRIMARY KEY,
    entry TEXT NOT NULL
);
