{{- define "causeway.labels" -}}
app.kubernetes.io/name: causeway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Labels of one part: dict "root" $ "part" "control". */}}
{{- define "causeway.part" -}}
{{ include "causeway.labels" .root }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "causeway.image" -}}
image: {{ printf "%s:%s" .Values.image.repository .Values.image.tag | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* What control and shards may: nothing. */}}
{{- define "causeway.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "causeway.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "causeway.controlHost" -}}
{{ .Release.Name }}-control.{{ .Release.Namespace }}.svc
{{- end }}

{{- define "causeway.shardsAreStateful" -}}
{{- if has .Values.shards.address (list "nodePort" "loadBalancer") }}yes{{ end }}
{{- end }}

{{/* What makes no sense is said here and not by a pod that does not start. */}}
{{- define "causeway.check" -}}
{{- if not (has .Values.shards.address (list "podIP" "hostPort" "nodePort" "loadBalancer")) }}
{{- fail (printf "shards.address is podIP, hostPort, nodePort or loadBalancer, not %q" .Values.shards.address) }}
{{- end }}
{{- if and (gt (int .Values.control.replicas) 1) (not .Values.control.postgresSecret) }}
{{- fail "control.replicas: more than one needs control.postgresSecret" }}
{{- end }}
{{- if eq .Values.shards.address "nodePort" }}
{{- if gt (int (include "causeway.mostShards" .)) 10 }}
{{- fail "shards.address=nodePort: ten shards at most" }}
{{- end }}
{{- if not .Values.shards.nodePort.host }}
{{- fail "shards.address=nodePort needs shards.nodePort.host: where the nodes are reached from outside" }}
{{- end }}
{{- end }}
{{- if and (eq .Values.shards.address "loadBalancer") (not .Values.shards.loadBalancer.domain) }}
{{- fail "shards.address=loadBalancer needs shards.loadBalancer.domain: each shard is at NAME-OF-ITS-POD.DOMAIN" }}
{{- end }}
{{- end }}

{{- define "causeway.mostShards" -}}
{{- if .Values.hpa.enabled }}{{ .Values.hpa.maxReplicas }}{{ else }}{{ .Values.shards.replicas }}{{ end }}
{{- end }}

{{- define "causeway.controlConfig" -}}
{{- $host := include "causeway.controlHost" . -}}
admin = "[::]:7444"
public = {{ toJson (.Values.control.public | default (list (printf "%s:7443" $host))) }}
names = {{ toJson (list $host (printf "%s-control-inside.%s.svc" .Release.Name .Release.Namespace)) }}
trust_domain = {{ toJson .Values.trustDomain }}
log = { format = "json" }

[ca]
cert = "/etc/causeway-ca/tls.crt"
key = "/etc/causeway-ca/tls.key"

[kubernetes]
enabled = true
shard_accounts = [{{ printf "%s/%s-shard" .Release.Namespace .Release.Name | toJson }}]
metrics_listen = "[::]:7446"
{{- end }}

{{/* Of a shard: dict "root" $ "part" "shard" or "egress". */}}
{{- define "causeway.shardConfig" -}}
{{- $values := .root.Values -}}
{{- $uds := eq .part "egress" -}}
listen = "[::]:{{ $uds | ternary $values.egress.uds.port $values.shards.port }}"
tcp = {{ $values.shards.tcp }}
admin = "[::]:7484"
domain = {{ toJson $values.domain }}
control = [{{ printf "%s:7443" (include "causeway.controlHost" .root) | toJson }}]
{{- $names := concat ($values.egress.tcp.enabled | ternary (list $values.egress.tcp.serverName) list) $values.shards.names }}
{{- if $names }}
names = {{ toJson $names }}
{{- end }}
drain_secs = {{ $values.shards.drainSeconds }}
weight = {{ $uds | ternary $values.egress.uds.weight $values.shards.weight }}
log = { format = "json" }

[doors]
proxy = {{ and $values.shards.doors.proxy (not $uds) | ternary "[::]:7480" "none" | quote }}
http = {{ and $values.shards.doors.http (not $uds) | ternary "[::]:7481" "none" | quote }}
https = {{ and $values.shards.doors.https (not $uds) | ternary "[::]:7482" "none" | quote }}
ssh = {{ and $values.shards.doors.ssh (not $uds) | ternary "[::]:2222" "none" | quote }}
{{- if $uds }}

[doors.egress]
socket = "{{ $values.egress.uds.folder }}/egress.sock"
grpc_socket = "{{ $values.egress.uds.folder }}/grpc.sock@localhost"
{{- end }}
{{- if $values.egress.tcp.enabled }}

[doors.egress.tcp]
listen = "[::]:{{ $values.egress.tcp.port }}"
client_ca = "/etc/causeway-clients/{{ $values.egress.tcp.clientCa.key }}"
clients = {{ toJson $values.egress.tcp.clients }}
{{- end }}
{{- end }}

{{/* Where edges reach it. A name of its own, which a shard would say by itself, is known in no DNS. */}}
{{- define "causeway.advertise" -}}
{{- $values := .root.Values -}}
{{- if eq .part "egress" -}}
$(HOST_IP):{{ $values.egress.uds.port }}
{{- else if eq $values.shards.address "hostPort" -}}
$(HOST_IP):{{ $values.shards.port }}
{{- else if eq $values.shards.address "nodePort" -}}
{{ $values.shards.nodePort.host }}:{{ $values.shards.nodePort.prefix }}$(POD_INDEX)
{{- else if eq $values.shards.address "loadBalancer" -}}
$(POD_NAME).{{ $values.shards.loadBalancer.domain }}:{{ $values.shards.port }}
{{- else -}}
$(POD_IP):{{ $values.shards.port }}
{{- end -}}
{{- end }}

{{/* The pod of a shard. */}}
{{- define "causeway.shardPod" -}}
{{- $values := .root.Values -}}
{{- $uds := eq .part "egress" -}}
{{- $name := printf "%s-%s" .root.Release.Name .part -}}
{{- $advertise := include "causeway.advertise" . -}}
{{- $port := $uds | ternary $values.egress.uds.port $values.shards.port -}}
metadata:
  labels: {{- include "causeway.part" . | nindent 4 }}
  annotations:
    # A new configuration is a new pod.
    causeway.dev/config: {{ include "causeway.shardConfig" . | sha256sum }}
spec:
  serviceAccountName: {{ .root.Release.Name }}-shard
  automountServiceAccountToken: false
  {{- with $values.image.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- if $uds }}
  # The folder of the socket is root's, as kube-apiserver is.
  securityContext:
    runAsUser: 0
    seccompProfile: {type: RuntimeDefault}
  {{- else }}
  securityContext: {{- include "causeway.podSecurity" . | nindent 4 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add $values.shards.drainSeconds 20 }}
  {{- with $uds | ternary $values.egress.uds.nodeSelector $values.cloud.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $uds }}
  priorityClassName: system-node-critical
  tolerations: [{operator: Exists}]
  {{- else }}
  {{- with $values.cloud.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "causeway.part" . | nindent 8 }}
  {{- end }}
  containers:
  - name: shard
    {{- include "causeway.image" .root | nindent 4 }}
    command:
    - mesh-cloud
    - --config=/etc/causeway/shard.toml
    # It enrols as the pod that it is: by the token of its service account, with the name of the pod.
    - --set=enrol.control={{ include "causeway.controlHost" .root }}:7443
    - --set=enrol.ca=$(CA_HASH)
    - --set=enrol.token_file=/var/run/secrets/causeway/token
    - --set=name="$(POD_NAME)"
    - --set=advertise=["{{ $advertise }}"]
    env:
    - name: CA_HASH
      valueFrom: {secretKeyRef: {name: {{ $values.ca.secret }}, key: hash}}
    - name: POD_NAME
      valueFrom: {fieldRef: {fieldPath: metadata.name}}
    {{- if contains "HOST_IP" $advertise }}
    - name: HOST_IP
      valueFrom: {fieldRef: {fieldPath: status.hostIP}}
    {{- end }}
    {{- if contains "POD_IP" $advertise }}
    - name: POD_IP
      valueFrom: {fieldRef: {fieldPath: status.podIP}}
    {{- end }}
    {{- if contains "POD_INDEX" $advertise }}
    - name: POD_INDEX
      valueFrom: {fieldRef: {fieldPath: "metadata.labels['apps.kubernetes.io/pod-index']"}}
    {{- end }}
    ports:
    - name: mesh
      containerPort: {{ $port }}
      protocol: UDP
      {{- if or $uds (eq $values.shards.address "hostPort") }}
      hostPort: {{ $port }}
      {{- end }}
    {{- if $values.shards.tcp }}
    # For edges in networks without UDP.
    - name: mesh-tcp
      containerPort: {{ $port }}
      {{- if or $uds (eq $values.shards.address "hostPort") }}
      hostPort: {{ $port }}
      {{- end }}
    {{- end }}
    - {name: admin, containerPort: 7484}
    {{- if $values.egress.tcp.enabled }}
    - {name: egress, containerPort: {{ $values.egress.tcp.port }}}
    {{- end }}
    {{- if not $uds }}
    {{- if $values.shards.doors.proxy }}
    - {name: proxy, containerPort: 7480}
    {{- end }}
    {{- if $values.shards.doors.http }}
    - {name: http, containerPort: 7481}
    {{- end }}
    {{- if $values.shards.doors.https }}
    - {name: https, containerPort: 7482}
    {{- end }}
    {{- if $values.shards.doors.ssh }}
    - {name: ssh, containerPort: 2222}
    {{- end }}
    {{- end }}
    startupProbe: {httpGet: {path: /livez, port: admin}, periodSeconds: 1, failureThreshold: 90}
    livenessProbe: {httpGet: {path: /livez, port: admin}, periodSeconds: 10, timeoutSeconds: 3}
    readinessProbe: {httpGet: {path: /readyz, port: admin}, periodSeconds: 2, timeoutSeconds: 2}
    resources: {{- toYaml $values.shards.resources | nindent 6 }}
    securityContext: {{- include "causeway.security" .root | nindent 6 }}
    volumeMounts:
    - {name: config, mountPath: /etc/causeway, readOnly: true}
    - {name: token, mountPath: /var/run/secrets/causeway, readOnly: true}
    - {name: data, mountPath: /var/lib/causeway/shard}
    {{- if $values.egress.tcp.enabled }}
    - {name: clients, mountPath: /etc/causeway-clients, readOnly: true}
    {{- end }}
    {{- if $uds }}
    - {name: sockets, mountPath: {{ $values.egress.uds.folder }}}
    {{- end }}
  volumes:
  - name: config
    configMap: {name: {{ $name }}}
  - name: token
    projected:
      sources:
      - serviceAccountToken: {audience: causeway, expirationSeconds: 3600, path: token}
  # The identity, which ends with the pod; in memory, so that its key is on no disk.
  - name: data
    emptyDir: {medium: Memory, sizeLimit: 16Mi}
  {{- if $values.egress.tcp.enabled }}
  - name: clients
    configMap: {name: {{ $values.egress.tcp.clientCa.configMap }}}
  {{- end }}
  {{- if $uds }}
  - name: sockets
    hostPath: {path: {{ $values.egress.uds.folder }}, type: DirectoryOrCreate}
  {{- end }}
{{- end }}
